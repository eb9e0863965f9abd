"""Open the database and run transactions in it.

``Database.open`` checks the server and the schema once. After that, each public function of storage is one
transaction; the decorators ``reads`` and ``writes`` say which kind, and let several of them share a transaction::

    jobs.submit(db, spec, spec_hash)                 # its own transaction
    with db.transaction() as session:                # all or nothing
        plans.publish(session, job, ...)
        jobs.record_stage(session, job, "publish", {})
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from storage import connection, schema
from storage.connection import translated
from storage.errors import UPGRADE_COMMAND, Conflict, DatabaseError, OldSchema, UnreachableDatabase

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Database:
    """An open database whose schema is the one this version writes. Safe to share between threads."""

    engine: Engine
    retry_seconds: float = 30.0
    """For how long a transaction is tried again after the connection broke, for example while a server restarts."""

    @classmethod
    def open(
        cls,
        url: str,
        *,
        migrate: bool = False,
        create: bool = True,
        check_schema: bool = True,
        retry_seconds: float = 30.0,
    ) -> Database:
        """Connect and check the schema.

        An SQLite file that is missing is created with the current schema, unless ``create`` is false. ``migrate``
        brings any database to the current schema. ``check_schema=False`` is for the migration commands.

        Raises a ``DatabaseError``: ``BadDatabaseURL``, ``UnreachableDatabase``, ``NotADatabase`` or ``OldSchema``.
        """
        parsed = connection.parse(url)
        fresh = connection.check_file(parsed, create=create)
        db = cls(connection.build_engine(parsed), retry_seconds)
        try:
            with translated(db.engine), db.engine.connect() as probe:
                connection.check_server(probe)
            if migrate or fresh:
                from storage import migration  # Alembic takes long to import, and is only needed here

                migration.upgrade(db.engine)
            elif check_schema:
                _check_schema(db)
        except BaseException:
            db.close()
            raise
        return db

    @property
    def safe_url(self) -> str:
        """The URL with its password hidden."""
        return connection.hide_password(self.engine.url)

    @property
    def dialect(self) -> str:
        """``"sqlite"`` or ``"postgresql"``."""
        return self.engine.dialect.name

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Database({self.safe_url!r})"

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """All writes inside happen together or not at all; on SQLite the write lock is taken at the start."""
        writing = self.engine.execution_options(**connection.WRITING)
        with translated(self.engine), Session(writing) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Read without taking a write lock."""
        with translated(self.engine), Session(self.engine) as session, session.begin():
            yield session


def _check_schema(db: Database) -> None:
    """Refuse a schema that this version does not write."""
    with translated(db.engine), db.engine.connect() as probe:
        found = connection.schema_revision(probe)
    if found == schema.REVISION:
        return
    from storage import migration

    if found is None:
        raise OldSchema(f"{db.safe_url} has no skipplan tables yet; create them with: {UPGRADE_COMMAND}")
    if found in migration.known_revisions():
        raise OldSchema(
            f"{db.safe_url} has schema {found}, this version needs {schema.REVISION}; "
            f"bring it up with: {UPGRADE_COMMAND}"
        )
    raise OldSchema(
        f"{db.safe_url} has schema {found}, which is newer than this version of skipplan knows "
        f"({schema.REVISION}); install the newer skipplan that wrote it ({UPGRADE_COMMAND} cannot go back)"
    )


def reads(work: Callable[Concatenate[Session, P], T]) -> Callable[Concatenate[Database | Session, P], T]:
    """Run in a reading transaction when called with a ``Database``, or in the given session."""
    return _in_transaction(work, Database.reading)


def writes(work: Callable[Concatenate[Session, P], T]) -> Callable[Concatenate[Database | Session, P], T]:
    """Run in a transaction of its own when called with a ``Database``, or as part of the given session's.

    A transaction that broke with its connection is run again: every function so decorated may run twice with the
    effect of once, or says in its docstring what a second run does.
    """
    return _in_transaction(work, Database.transaction)


def _in_transaction(
    work: Callable[Concatenate[Session, P], T], begin: Callable[[Database], AbstractContextManager[Session]]
) -> Callable[Concatenate[Database | Session, P], T]:
    @functools.wraps(work)
    def call(db: Database | Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if isinstance(db, Session):
            return work(db, *args, **kwargs)

        def attempt() -> T:
            with begin(db) as session:
                return work(session, *args, **kwargs)

        return _retrying(db, attempt)

    return call


def _retrying(db: Database, attempt: Callable[[], T]) -> T:
    """Call until the connection holds, at most for the database's ``retry_seconds``."""
    deadline = time.monotonic() + db.retry_seconds
    pause = 0.05
    while True:
        try:
            return attempt()
        except DatabaseError as error:
            if not isinstance(error, UnreachableDatabase | Conflict) or time.monotonic() + pause > deadline:
                raise
            logger.warning("trying again in %.2f s: %s", pause, error)
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
