"""Bring a database's schema up to date, from any working directory and from an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from storage import connection as connections
from storage.connection import hide_password, translated
from storage.errors import UPGRADE_COMMAND, DatabaseError, OldSchema
from storage.schema import Base

FOLDER = Path(__file__).parent / "migrations"

_MIGRATION_LOCK = 0x736B6970  # "skip": the key of PostgreSQL's advisory lock


def upgrade(engine: Engine) -> None:
    """Run the missing migrations, all of them or none. Processes that do so at once wait for each other.

    Raises ``OldSchema`` when the database is newer than this version knows.
    """
    with _locked(engine) as connection:
        _refuse_unknown(connection)
        config = Config()
        config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def current(engine: Engine) -> str | None:
    """Read the revision that the database is at; ``None`` before the first migration."""
    with translated(engine), engine.connect() as connection:
        return connections.schema_revision(connection)


def head() -> str:
    """Return the newest revision that this version knows."""
    revision = ScriptDirectory(str(FOLDER)).get_current_head()
    assert revision is not None
    return revision


@cache
def known_revisions() -> frozenset[str]:
    """Return every revision that this version knows."""
    return frozenset(script.revision for script in ScriptDirectory(str(FOLDER)).walk_revisions())


def check(engine: Engine) -> list[str]:
    """List what differs between the database and the tables that this version writes; empty when nothing does."""
    found, newest = current(engine), head()
    if found != newest:
        return [f"schema is at {found or 'no revision'}, this version writes {newest}; run: {UPGRADE_COMMAND}"]
    with translated(engine), engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=COMPARE_OPTIONS)
        return [_describe(difference) for difference in compare_metadata(context, Base.metadata)]


def _is_ours(name: str | None, kind: str, parents: Any) -> bool:
    """Leave tables alone that another application keeps in the same database."""
    return kind != "table" or name in Base.metadata.tables


COMPARE_OPTIONS: dict[str, Any] = {
    "version_table": connections.VERSION_TABLE,
    "compare_type": True,
    "include_name": _is_ours,
    "target_metadata": Base.metadata,
}


def _describe(difference: Any) -> str:
    steps = difference if isinstance(difference, list) else [difference]
    return "; ".join(" ".join(str(part) for part in step if part is not None) for step in steps)


def _refuse_unknown(connection: Connection) -> None:
    found = connections.schema_revision(connection)
    if found is not None and found not in known_revisions():
        raise OldSchema(
            f"{hide_password(connection.engine.url)} has schema {found}, which is newer than this version of skipplan "
            f"knows ({head()}); install the newer skipplan that wrote it"
        )


@contextmanager
def _locked(engine: Engine) -> Iterator[Connection]:
    """One transaction that nobody else can migrate in."""
    with translated(engine), engine.connect() as connection:
        connection = connection.execution_options(**connections.WRITING)
        sqlite = engine.dialect.name == "sqlite"
        if sqlite:
            # Batch mode rebuilds tables, which must not cascade; the setting only takes outside a transaction.
            _outside_transaction(connection, "PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                if not sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                yield connection
                if sqlite and connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                    raise DatabaseError(
                        f"{hide_password(engine.url)}: migrating would break references between tables; not done"
                    )
        finally:
            if sqlite:
                _outside_transaction(connection, "PRAGMA foreign_keys = ON")


def _outside_transaction(connection: Connection, statement: str) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute(statement)
