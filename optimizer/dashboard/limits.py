"""Limit what one caller may send: requests a minute, and bytes a request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 256 * 1024
"""Bytes of a request's body; job files have a few kilobytes."""

BODY_SECONDS = 30.0
MOST_CALLERS = 4096


class RateLimit:
    """Admit so many requests a minute of each caller, up to all of them at once.

    The generic cell rate algorithm: of each caller, the moment is kept at which its requests so far would have been
    through at the steady rate.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 60.0 / per_minute
        self._clock = clock
        self._through: OrderedDict[str, float] = OrderedDict()

    def admit(self, caller: str) -> float:
        """Count a request and return 0, or return the seconds until the next one is admitted."""
        now = self._clock()
        through = max(now, self._through.get(caller, now))
        wait = through + self._interval - now - 60.0
        if wait > 1e-6:
            return wait
        self._through[caller] = through + self._interval
        self._through.move_to_end(caller)
        while len(self._through) > MOST_CALLERS:
            self._through.popitem(last=False)
        return 0.0

    def exhausted(self, caller: str) -> float:
        """Return the seconds until the next request is admitted, without counting one; 0 when it would be."""
        now = self._clock()
        return max(0.0, max(now, self._through.get(caller, now)) + self._interval - now - 60.0)


class Room:
    """Let few requests at a time do what takes long, few more wait for that, and none beyond these.

    Every request that waits holds one of the threads that all requests are answered by.
    """

    def __init__(self, working: int, waiting: int, seconds: float) -> None:
        self._working = threading.BoundedSemaphore(working)
        self._inside = threading.BoundedSemaphore(working + waiting)
        self._seconds = seconds

    @contextmanager
    def take(self) -> Iterator[None]:
        """Work inside. Raises HTTPException where there is no room."""
        busy = HTTPException(503, "the service is busy with other requests", {"Retry-After": "10"})
        if not self._inside.acquire(blocking=False):
            raise busy
        try:
            if not self._working.acquire(timeout=self._seconds):
                raise busy
            try:
                yield
            finally:
                self._working.release()
        finally:
            self._inside.release()


class BodyLimit:
    """Read a request's body before the application does, and refuse a large or a slow one."""

    def __init__(self, app: ASGIApp, most: int = LARGEST_BODY, seconds: float = BODY_SECONDS) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body read."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._seconds)
        except TimeoutError:
            await JSONResponse({"detail": "the body did not arrive in time"}, 408)(scope, receive, send)
            return
        if body is None:
            detail = f"the body is larger than {self._most} bytes"
            await JSONResponse({"detail": detail}, 413, {"Connection": "close"})(scope, receive, send)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body; None as soon as it is too large."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self._most:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self._most:
                return None
            if not message.get("more_body", False):
                return bytes(body)
