"""Who may do what: everybody on this machine may read, or whoever has the token; to write takes a token of a role."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool

from optimizer.dashboard.limits import RateLimit
from optimizer.errors import UsageFault
from storage.database import Database
from storage.errors import DatabaseError
from storage.queue import tokens
from storage.queue.tokens import Token
from storage.schema import ROLES

COOKIE = "skipplan_access"
SESSION_SECONDS = 12 * 3600
SHORTEST_TOKEN = 16
READS_PER_MINUTE = 600
WRITES_PER_MINUTE = 60
FAILURES_PER_MINUTE = 30
"""Wrong tokens from one address; further requests from there are refused unread."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would not say where a form comes from
    "Cache-Control": "no-store",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

Next = Callable[[Request], Awaitable[Response]]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None, *, api: bool = False) -> None:
    """Refuse to listen for other machines without a token, or with one that can be guessed. Raises UsageFault."""
    if token is None and not api and not is_loopback(host):
        raise UsageFault(
            f"--host {host}: other machines could read the database; set a token in SKIPPLAN_DASHBOARD_TOKEN, "
            "or listen on 127.0.0.1"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UsageFault(f"SKIPPLAN_DASHBOARD_TOKEN: must have at least {SHORTEST_TOKEN} characters")


def hosts_for(host: str, *, is_open: bool) -> list[str]:
    """Host names that requests may be addressed to.

    Without a token only this machine's own names: a foreign page could otherwise point a name of its own at this
    address and read the answers (DNS rebinding).
    """
    return ["localhost", "127.0.0.1", "[::1]", "testserver", host] if is_open else ["*"]


@dataclass(frozen=True)
class Caller:
    """Who asks: what the answer to a request depends on."""

    name: str
    role: str
    token: Token | None = None
    """The token of the API; None for the dashboard's own, and where none is asked for."""
    session: str | None = None
    """The cookie, where that and no bearer token says who asks."""

    def may(self, role: str) -> bool:
        """Whether the caller's role includes another."""
        return ROLES.index(self.role) >= ROLES.index(role)


class Gate:
    """Tell who asks, by bearer token or by the cookie that the login page sets, and let nobody else through.

    With ``database`` the tokens in it count, and without one nothing is shown.
    """

    def __init__(self, token: str | None, database: Database | None = None) -> None:
        self._token, self._database = token, database
        self._key = secrets.token_bytes(32)  # sessions end with this process
        self._failures = RateLimit(FAILURES_PER_MINUTE)
        self._reads, self._writes = RateLimit(READS_PER_MINUTE), RateLimit(WRITES_PER_MINUTE)

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return self._token is None and self._database is None

    def accept(self, given: str) -> str | None:
        """Return the cookie for a token; None where it is none. Raises DatabaseError."""
        if self._token is not None and _equal(given, self._token):
            return self._own_cookie()
        token = None if self._database is None else tokens.verify(self._database, given)
        return None if token is None else self._session(token)

    def form_secret(self, caller: Caller) -> str:
        """Return what a form of the caller's session must hold, so that no foreign page can send one."""
        return hmac.new(self._key, f"form {caller.session}".encode(), hashlib.sha256).hexdigest()

    def proves_session(self, caller: Caller, given: str) -> bool:
        """Whether a form was sent from a page of the caller's session."""
        return caller.session is not None and _equal(given, self.form_secret(caller))

    def identify(self, request: Request) -> Caller | None:
        """Tell who asks; None without a valid token. Raises DatabaseError."""
        if self.is_open:
            return Caller("anybody", "read")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._bearer(given.strip())
        cookie = request.cookies.get(COOKIE, "")
        if self._token is not None and _equal(cookie, self._own_cookie()):
            return Caller("dashboard", "read", session=cookie)
        token = self._of_session(cookie)
        return None if token is None else Caller(token.name, token.role, token, session=cookie)

    def _bearer(self, given: str) -> Caller | None:
        if self._token is not None and _equal(given, self._token):
            return Caller("dashboard", "read")
        token = None if self._database is None else tokens.verify(self._database, given)
        return None if token is None else Caller(token.name, token.role, token)

    def _own_cookie(self) -> str:
        """Hash the dashboard's token for the cookie, so that the browser does not store the token itself."""
        return hashlib.sha256(f"skipplan dashboard {self._token}".encode()).hexdigest()

    def _session(self, token: Token, expires: int | None = None) -> str:
        until = expires if expires is not None else int(time.time()) + SESSION_SECONDS
        signed = hmac.new(self._key, f"session {token.handle} {token.id} {until}".encode(), hashlib.sha256).hexdigest()
        return f"{token.handle}.{until}.{signed}"

    def _of_session(self, cookie: str) -> Token | None:
        """Return the token that a session was begun with, if it is still valid and the session has not expired."""
        handle, _, rest = cookie.partition(".")
        until, _, _ = rest.partition(".")
        if self._database is None or not (until.isascii() and until.isdigit()) or len(cookie) > 200:
            return None
        if int(until) < time.time():
            return None
        token = tokens.get(self._database, handle)
        return token if token is not None and _equal(cookie, self._session(token, int(until))) else None

    def refuse_guesses(self, request: Request) -> float:
        """Return the seconds for which an address that sent many wrong tokens is not listened to; 0 for none."""
        return self._failures.exhausted(_address(request))

    def count_failure(self, request: Request) -> None:
        """Remember that an address sent a wrong token."""
        self._failures.admit(_address(request))

    async def guard(self, request: Request, go_on: Next) -> Response:
        """Answer whoever may not go on, and put the security headers on every answer."""
        try:
            response = await self._refusal(request) or await go_on(request)
        except DatabaseError:  # without the tokens nobody can be told apart
            response = JSONResponse({"detail": "the database cannot be read"}, 503)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    async def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that may not go on; None for one that may."""
        path, writes = request.url.path, request.method not in SAFE_METHODS
        for_programs = path.startswith("/api/") or path == "/openapi.json"
        if not self.is_open and (wait := self.refuse_guesses(request)):
            return _too_many(wait, "too many wrong tokens from this address")
        caller = self.identify(request) if self.is_open else await run_in_threadpool(self.identify, request)
        if caller is None and ("authorization" in request.headers or COOKIE in request.cookies):
            self.count_failure(request)
        if writes and _is_foreign(request):
            return JSONResponse({"detail": "the request comes from a page of another site"}, 403)
        if writes and for_programs and caller is not None and caller.session is not None:
            caller = None  # a cookie is sent along by browsers, whoever wrote the page; the API takes none to write
        request.state.caller = caller
        if path == "/login" or path.startswith("/static/"):
            return None
        if caller is None:
            if not for_programs:
                return RedirectResponse("/login", 303)
            detail = {"detail": "a token is needed: Authorization: Bearer TOKEN"}
            return JSONResponse(detail, 401, {"WWW-Authenticate": "Bearer"})
        limit = self._writes if writes else self._reads
        wait = 0.0 if self.is_open else limit.admit(caller.name)
        return _too_many(wait, f"too many requests with the token {caller.name}") if wait else None


def _too_many(seconds: float, detail: str) -> Response:
    wait = math.ceil(seconds)
    return JSONResponse({"detail": f"{detail}; wait {wait} s"}, 429, {"Retry-After": str(wait)})


def _address(request: Request) -> str:
    """Return the client's address; of IPv6 the network, which a client has all of."""
    host = request.client.host if request.client else ""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else host


def _is_foreign(request: Request) -> bool:
    """Whether a browser says that a page of another site sent the request."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")


def _equal(first: str, second: str) -> bool:
    return hmac.compare_digest(first.encode(), second.encode())
