"""Who may read: everybody on this machine, or whoever has the token. Nobody may write, there is nothing to write to."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from optimizer.errors import UsageFault

COOKIE = "skipplan_access"
SHORTEST_TOKEN = 16
OPEN_PATHS = ("/login", "/static/")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Next = Callable[[Request], Awaitable[Response]]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None) -> None:
    """Refuse to listen for other machines without a token, or with one that can be guessed. Raises UsageFault."""
    if token is None and not is_loopback(host):
        raise UsageFault(
            f"--host {host}: other machines could read the database; set a token in SKIPPLAN_DASHBOARD_TOKEN, "
            "or listen on 127.0.0.1"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UsageFault(f"SKIPPLAN_DASHBOARD_TOKEN: must have at least {SHORTEST_TOKEN} characters")


def hosts_for(host: str, token: str | None) -> list[str]:
    """Host names that requests may be addressed to.

    Without a token only this machine's own names: a foreign page could otherwise point a name of its own at this
    address and read the answers (DNS rebinding).
    """
    return ["localhost", "127.0.0.1", "[::1]", "testserver", host] if token is None else ["*"]


class Gate:
    """Lets a request through that carries the token, as a bearer token or in the cookie that the login page sets."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return self._token is None

    def admits(self, request: Request) -> bool:
        """Whether the request may read."""
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(given.strip(), self._token):
            return True
        return _equal(request.cookies.get(COOKIE, ""), self.cookie())

    def accepts(self, token: str) -> bool:
        """Whether this is the token."""
        return self._token is not None and _equal(token, self._token)

    def cookie(self) -> str:
        """Hash the token for the cookie, so that the browser does not store the token itself."""
        return hashlib.sha256(f"skipplan dashboard {self._token}".encode()).hexdigest()

    async def guard(self, request: Request, go_on: Next) -> Response:
        """Answer 401 or send to the login page, and put the security headers on every answer."""
        path = request.url.path
        if self.admits(request) or path.startswith(OPEN_PATHS):
            response = await go_on(request)
        elif path.startswith("/api/") or path == "/openapi.json":
            response = JSONResponse({"detail": "a token is needed: Authorization: Bearer TOKEN"}, 401)
            response.headers["WWW-Authenticate"] = "Bearer"
        else:
            response = RedirectResponse("/login", 303)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response


def _equal(first: str, second: str) -> bool:
    return hmac.compare_digest(first.encode(), second.encode())
