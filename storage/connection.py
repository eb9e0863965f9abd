"""Connect to either engine: URLs, SQLite's settings, server versions, and the meaning of drivers' errors."""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from storage.errors import (
    BadDatabaseURL,
    BusyDatabase,
    Conflict,
    DatabaseError,
    NotADatabase,
    StorageError,
    UnreachableDatabase,
)

VERSION_TABLE = "skipplan_version"
"""Not Alembic's default name, so that the database may be shared with another application."""

WRITING = {"skipplan_writing": True}
"""Execution options of a transaction that will write."""

BUSY_MILLISECONDS = 60_000
SQLITE_OLDEST = (3, 35)
POSTGRESQL_OLDEST = (13,)
EXPECTED = "expected sqlite:///path/to/file.db or postgresql://user:password@host/database"

_SHORT_SECRET = 5
_SQLITE_OPTIONS = ("timeout", "detect_types", "isolation_level", "check_same_thread", "cached_statements")
_SECRET_OPTIONS = ("password", "sslpassword", "passfile", "sslkey")
_BROKEN_CONNECTION = (
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now: the server is starting
    "53300",  # too_many_connections
)
_CONFLICT = ("40001", "40P01")  # serialization_failure, deadlock_detected


def parse(url: str) -> URL:
    """Read a URL, naming the driver we ship with. Raises ``BadDatabaseURL`` without repeating what may be secret."""
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        # The text itself may hold a password that could not be told apart, so it is not repeated.
        raise BadDatabaseURL(f"the database URL cannot be read; {EXPECTED}") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite":
        if parsed.host:
            raise BadDatabaseURL(f"{hide_password(parsed)}: three slashes before a path, sqlite:///path/to/file.db")
        if "?" in url and (not parsed.query or not set(parsed.query) <= set(_SQLITE_OPTIONS)):
            raise BadDatabaseURL(
                f"{hide_password(parsed)}: the path ends at the question mark of the URL; give a path without one"
            )
        if parsed.database in (None, "", ":memory:"):
            raise BadDatabaseURL("a database in memory would lose its jobs; give a file: sqlite:///path/to/file.db")
    elif parsed.drivername != "postgresql+psycopg":
        raise BadDatabaseURL(f"database type {parsed.drivername!r} is not supported; {EXPECTED}")
    elif any("@" in (part or "") for part in (parsed.host, parsed.database)):
        # What stands before the last @ is the end of a password: it would be shown, and dialled, as the host.
        raise BadDatabaseURL("the database URL has an @ too many; a password needs %40 for @, %2F for / and %3A for :")
    return parsed


def hide_password(url: URL) -> str:
    """Write a URL for people: no password, neither in its place nor among the options."""
    secret = [key for key in url.query if key.lower() in _SECRET_OPTIONS]
    return (
        url.update_query_dict(dict.fromkeys(secret, "***"))
        .render_as_string(hide_password=True)
        .replace("+psycopg", "", 1)
    )


def check_file(url: URL, *, create: bool) -> bool:
    """Look at an SQLite file before the driver does; true when there is nothing in it yet.

    Raises ``UnreachableDatabase`` (no such directory, or no file and ``create`` is false) or ``NotADatabase``.
    """
    if url.drivername != "sqlite":
        return False
    path = Path(str(url.database))
    try:
        if path.is_dir():
            raise NotADatabase(f"{path} is a directory; give a file: sqlite:///{path}/skipplan.db")
        if not path.parent.is_dir():
            raise UnreachableDatabase(f"cannot create {path}: the directory {path.parent} does not exist")
        if not path.exists():
            if not create:
                raise UnreachableDatabase(f"there is no database at {path}; a first job creates it")
            return True
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UnreachableDatabase(f"cannot read {path}: {error.strerror}") from None
    if start and start != b"SQLite format 3\x00":
        raise NotADatabase(f"{path} is not an SQLite database; name another file")
    return not start


def build_engine(url: URL) -> Engine:
    """Create the engine; parameters stay out of error messages, because a job's spec would be among them."""
    if url.drivername == "sqlite":
        engine = create_engine(url, hide_parameters=True)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    given = {key: value for key, value in url.query.items() if key in ("connect_timeout", "application_name")}
    try:
        return create_engine(
            url,
            hide_parameters=True,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10, "application_name": "skipplan"} | given,
        )
    except ModuleNotFoundError:
        raise DatabaseError("PostgreSQL needs its driver; install it with: pip install 'skipplan[postgres]'") from None


def _set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself: _begin_sqlite does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
    mode = _use_write_ahead_log(cursor)
    if mode != "wal":
        raise sqlite3.OperationalError(f"write-ahead log refused ({mode})")
    cursor.execute("PRAGMA synchronous = FULL")  # a committed job survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_write_ahead_log(cursor: sqlite3.Cursor) -> str:
    """Switch the file to write-ahead logging; return the journal mode that it then has.

    Two processes that switch a new file at once each hold a read lock and want the other's gone: SQLite sees the
    deadlock and refuses one of them at once, without waiting for ``busy_timeout``. The refused one tries again.
    """
    deadline = time.monotonic() + BUSY_MILLISECONDS / 1000
    while True:
        try:
            return str(cursor.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.005, 0.05))  # not in step with the other one


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail at once, without waiting, if another wrote between.
    writing = connection.get_execution_options().get("skipplan_writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def check_server(connection: Connection) -> None:
    """Refuse an engine too old for the statements used."""
    oldest = SQLITE_OLDEST if connection.dialect.name == "sqlite" else POSTGRESQL_OLDEST
    version = tuple(connection.dialect.server_version_info or ())
    if version < oldest:
        have, need = (".".join(map(str, numbers)) for numbers in (version, oldest))
        raise DatabaseError(f"{connection.dialect.name} {have} is too old; {need} or newer is needed")


def schema_revision(connection: Connection) -> str | None:
    """Read the revision that the database is at; ``None`` before the first migration."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one_or_none()


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Turn the driver's errors into one line each, with the URL but without its password."""
    try:
        yield
    except DBAPIError as error:
        raise translate(error, engine.url) from error
    except PoolTimeout:
        where = hide_password(engine.url)
        raise BusyDatabase(f"{where}: too many threads use this connection pool at once") from None
    except StatementError as error:
        # What our column types refuse comes wrapped.
        raise (error.orig if isinstance(error.orig, StorageError) else error) from None


def translate(error: DBAPIError, url: URL) -> DatabaseError:
    """Name a driver's error in one line that holds no password."""
    reason = " ".join(str(error.orig).split()) if error.orig is not None else type(error).__name__
    secrets = [str(url.password)] if url.password is not None else []
    secrets += [str(value) for key, value in url.query.items() if key.lower() in _SECRET_OPTIONS]
    for secret in filter(None, secrets):
        edge = r"(?<!\w)", r"(?!\w)"  # a short one stands inside words that have nothing to do with it
        before, after = edge if len(secret) < _SHORT_SECRET else ("", "")
        reason = re.sub(before + re.escape(secret) + after, "***", reason)
    state = getattr(error.orig, "sqlstate", None)
    where = hide_password(url)
    if "file is not a database" in reason or "malformed" in reason:
        return NotADatabase(f"{where}: not an SQLite database, or a damaged one ({reason})")
    if "database is locked" in reason:
        seconds = BUSY_MILLISECONDS // 1000
        return BusyDatabase(f"{where}: another process held the write lock for more than {seconds} s")
    if "write-ahead log refused" in reason:
        return DatabaseError(
            f"{where}: its file system cannot hold SQLite's write-ahead log; use a local disk, or PostgreSQL"
        )
    if state in _CONFLICT:
        return Conflict(f"{where}: {reason}")
    never_connected = url.drivername != "sqlite" and state is None and type(error).__name__ == "OperationalError"
    if error.connection_invalidated or state in _BROKEN_CONNECTION or never_connected:
        return UnreachableDatabase(f"cannot reach {where}: {reason}")
    if "unable to open database file" in reason:
        return UnreachableDatabase(f"cannot open {where}: no permission, or no such directory")
    return DatabaseError(f"{where}: {reason}")
