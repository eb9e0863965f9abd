"""Tell hooks what becomes of jobs: signed JSON to a URL, or a command of this process's environment.

Messages lie in the database (``storage.queue.deliveries``); any process that runs jobs sends those that are due.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import json
import os
import shlex
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

from optimizer.service import logs
from storage.database import Database
from storage.errors import StorageError
from storage.queue import deliveries
from storage.queue.deliveries import Delivery
from workers.text import one_line

SECRET = "SKIPPLAN_HOOK_SECRET"
COMMAND = "SKIPPLAN_HOOK_COMMAND"
PRIVATE = "SKIPPLAN_HOOK_PRIVATE"
"""Set to 1 where hooks may have addresses of this machine and of private networks."""

SIGNATURE_HEADER = "X-Skipplan-Signature"
DELIVERY_HEADER = "X-Skipplan-Delivery"
SEND_SECONDS = 15.0
COMMAND_SECONDS = 60.0
LEASE_SECONDS = 120.0
POLL_SECONDS = 2.0
FLUSH_SECONDS = 20.0
RETRY_SECONDS = 2.0
"""For a database that is away: messages wait there in any case."""

FIRST_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 3600.0
MOST_ATTEMPTS = 24
"""With these pauses, over about half a day."""

_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""IPv6 addresses that stand for IPv4 ones behind a translator."""


class Undelivered(Exception):  # noqa: N818  (what happened to a message)
    """A message did not arrive, for a reason in one line."""


def sign(secret: str, moment: int, body: bytes) -> str:
    """Return the value of the signature's header: the time in seconds, and HMAC-SHA256 of ``time.body``."""
    digest = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={digest}"


def send(delivery: Delivery, secret: str | None) -> None:
    """Send a message once, to a URL signed with the secret. Raises Undelivered."""
    body = json.dumps(delivery.payload | {"delivery": delivery.id, "at": delivery.created_at.isoformat()}).encode()
    if delivery.target == "command":
        _run_command(body)
    else:
        _post(delivery, body, secret)


def _run_command(body: bytes) -> None:
    words = shlex.split(os.environ.get(COMMAND, ""))
    if not words:
        raise Undelivered(f"notify asks for the command, and {COMMAND} names none here")
    try:
        done = subprocess.run(words, input=body, capture_output=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Undelivered(f"{words[0]}: {one_line(error)}") from None
    if done.returncode != 0:
        said = one_line(done.stderr.decode("utf-8", "replace"))[-300:]
        raise Undelivered(f"{words[0]} ended with exit code {done.returncode}: {said}")


def _post(delivery: Delivery, body: bytes, secret: str | None) -> None:
    """Send a message to a URL: to an address that was looked at, and to no other that an answer may name."""
    if not secret:
        raise Undelivered(f"{SECRET} is not set where the job runs; messages are sent signed or not at all")
    parts = urlsplit(delivery.target)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    addresses = find_addresses(host, port)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    moment = int(time.time())
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": "skipplan",
        SIGNATURE_HEADER: sign(secret, moment, body),
        DELIVERY_HEADER: str(delivery.id),
    }
    try:
        status = _exchange(parts.scheme, host, _connect(addresses), path, headers, body)
    except (OSError, http.client.HTTPException) as error:
        raise Undelivered(f"{host}: {one_line(error) or type(error).__name__}") from None
    if not 200 <= status < 300:
        raise Undelivered(f"{host} answered with status {status}")


def find_addresses(host: str, port: int) -> list[tuple[str, int]]:
    """Resolve a host once, in the system's order. Raises Undelivered where an address is not public, unless allowed."""
    try:
        found = [each[4][:2] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise Undelivered(f"{host}: no such host") from None
    addresses = list(dict.fromkeys((str(address), int(number)) for address, number in found))
    if os.environ.get(PRIVATE) != "1" and not all(is_public(address) for address, _ in addresses):
        raise Undelivered(f"{host} is an address of this machine or of a private network; {PRIVATE}=1 allows those")
    return addresses


def is_public(text: str) -> bool:
    """Whether an address is one of the public network, also where it stands for another one."""
    address = ipaddress.ip_address(text.split("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if address.teredo is not None or any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast


def _connect(addresses: list[tuple[str, int]]) -> socket.socket:
    """Connect to the first address that takes it: a host may have some that this machine cannot reach."""
    for address in addresses[:-1]:
        with suppress(OSError):
            return socket.create_connection(address, timeout=SEND_SECONDS / len(addresses))
    return socket.create_connection(addresses[-1], timeout=SEND_SECONDS / len(addresses))


def _exchange(scheme: str, host: str, opened: socket.socket, path: str, headers: dict[str, str], body: bytes) -> int:
    """POST over a connection and return the status; the whole exchange has ``SEND_SECONDS``."""
    connection = http.client.HTTPConnection(host)
    connection.sock = opened
    watchdog = threading.Timer(SEND_SECONDS, lambda: _shut(connection.sock))
    watchdog.daemon = True
    watchdog.start()
    try:
        opened.settimeout(SEND_SECONDS)
        if scheme == "https":  # wrapping detaches the first socket: the watchdog gets the new one before the handshake
            context = ssl.create_default_context()
            wrapped = context.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
            connection.sock = wrapped
            wrapped.do_handshake()
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        watchdog.cancel()
        connection.close()
        opened.close()


def _shut(opened: socket.socket | None) -> None:
    if opened is None:  # the answer is there, and its connection closed
        return
    with suppress(OSError):
        socket.socket.shutdown(opened, socket.SHUT_RDWR)  # TLS's own would change what another thread is reading from


def deliver_due(db: Database, until: float | None = None, *, secret: str | None = None) -> int:
    """Send all messages that are due, until a moment of the monotonic clock; how many were tried.

    Where no secret is given, that of the environment signs. Raises DatabaseError.
    """
    secret = secret or os.environ.get(SECRET)
    tried = 0
    while until is None or time.monotonic() < until:
        delivery = deliveries.claim(db, LEASE_SECONDS)
        if delivery is None:
            break
        tried += 1
        try:
            send(delivery, secret)
        except Exception as error:
            reason = one_line(error) if isinstance(error, Undelivered) else f"{type(error).__name__}: {one_line(error)}"
            given_up = delivery.attempts >= MOST_ATTEMPTS
            wait = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (delivery.attempts - 1))
            deliveries.record_failure(db, delivery, reason, None if given_up else wait)
            logs.log("hook_given_up" if given_up else "hook_failed", job=delivery.job_id, reason=reason)
        else:
            deliveries.record_delivered(db, delivery)
    return tried


@contextmanager
def delivering(db: Database) -> Iterator[None]:
    """Send messages from a thread while the block runs, and what is due at its end; a hook never fails the block."""
    stop = threading.Event()
    secret = os.environ.get(SECRET)  # now: it is hidden while Ray starts
    db = replace(db, retry_seconds=RETRY_SECONDS)

    def work() -> None:
        while not stop.wait(POLL_SECONDS):
            with suppress(StorageError):  # tried again
                deliver_due(db, secret=secret)

    thread = threading.Thread(target=work, name="hooks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(FLUSH_SECONDS)
        with suppress(StorageError):
            deliver_due(db, until=time.monotonic() + FLUSH_SECONDS, secret=secret)
