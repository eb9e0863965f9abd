"""Define column types that read back on both engines as they were written, and database time as an SQL expression."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Dialect, Double, Integer, literal
from sqlalchemy import DateTime as SQLDateTime
from sqlalchemy import Text as SQLText
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import JSON, TypeDecorator

from storage.errors import InvalidValue

# SQLite numbers rows by itself only when the primary key is its INTEGER, which holds 64 bits anyway.
RowId = BigInteger().with_variant(Integer(), "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC with its zone; SQLite stores it naive, so the zone is taken off and put back here."""

    impl = SQLDateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a naive time: nobody could say which moment it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise InvalidValue(f"time {value.isoformat()} has no zone; give one in UTC")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give every time back in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Text(TypeDecorator[str]):
    """Text that both engines can store: NUL characters and lone surrogates become the replacement character."""

    impl = SQLText
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Clean what PostgreSQL would refuse; messages of crashed processes do contain such characters."""
        if value is None:
            return None
        return value.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Real(TypeDecorator[float]):
    """A finite number; SQLite would store a NaN as NULL, and PostgreSQL would sort it above everything."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Refuse NaN and infinities."""
        if value is not None and not math.isfinite(value):
            raise InvalidValue(f"{value} cannot be stored as a measurement")
        return value


class Json(TypeDecorator[Any]):
    """JSON with its order of keys kept; NaN and infinities are refused, because JSON has none."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Check before the engine's own serializer, whose error would not name the reason."""
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidValue(f"value cannot be stored as JSON: {error}") from None
        return value


class database_now(FunctionElement[datetime]):  # noqa: N801  (an SQL function, named as SQLAlchemy names them)
    """The database's own clock, plus ``seconds``: all leases are judged by it, never by a client's clock."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(literal(float(seconds), Double()))


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # The three zeros make milliseconds as wide as the microseconds that SQLAlchemy writes, so that text order is time.
    seconds = compiler.process(element.clauses, **kwargs)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {seconds}))"


@compiles(database_now, "postgresql")
def _postgresql_now(element: database_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # clock_timestamp and not now: a transaction that waited for a lock must not judge leases by when it began.
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kwargs)}))"
