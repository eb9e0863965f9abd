"""INSERT ... ON CONFLICT, which both engines have and SQLAlchemy spells per dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session


def insert(session: Session, table: type[DeclarativeBase]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT of the session's dialect."""
    dialect = session.get_bind().dialect.name
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)


def insert_or_keep(
    session: Session,
    table: type[DeclarativeBase],
    rows: Sequence[dict[str, Any]],
    key: Sequence[InstrumentedAttribute[Any]],
) -> None:
    """Insert the rows whose key is not there yet; rows that are there stay as they are."""
    if rows:
        session.execute(insert(session, table).on_conflict_do_nothing(index_elements=list(key)), list(rows))


def insert_or_replace(
    session: Session,
    table: type[DeclarativeBase],
    rows: Sequence[dict[str, Any]],
    key: Sequence[InstrumentedAttribute[Any]],
    *,
    also: dict[str, Any] | None = None,
    where: ColumnElement[bool] | None = None,
    key_where: ColumnElement[bool] | None = None,
) -> None:
    """Insert the rows; one whose key is there takes the new values (if ``where`` holds for the old row).

    ``also`` names columns that a replaced row takes besides, as SQL expressions (a new one has its defaults).
    ``key_where`` is the condition of the unique index when that index is partial.
    """
    if not rows:
        return
    statement = insert(session, table)
    names = {column.key for column in key}
    changed = {name: statement.excluded[name] for name in rows[0] if name not in names}
    statement = statement.on_conflict_do_update(
        index_elements=list(key), index_where=key_where, set_=changed | (also or {}), where=where
    )
    session.execute(statement, list(rows))
