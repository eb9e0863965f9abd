"""Say of a record's field, once, what it means and what it may hold."""

from __future__ import annotations

import math
from dataclasses import field, fields
from typing import Any

from storage.errors import InvalidValue


def described(description: str | None = None, *, default: Any = ..., **limits: Any) -> Any:
    """Declare a dataclass field with its meaning and its range (``ge``, ``gt``, ``le``, ``lt``).

    JSON schemas and the checks of files read both from the field, and ``check_ranges`` the range.
    """
    known: dict[str, Any] = {} if description is None else {"description": description}
    return field(metadata=known | limits) if default is ... else field(default=default, metadata=known | limits)


def check_ranges(record: Any, subject: str) -> None:
    """Refuse a number that is not finite or out of its field's range. Raises ``InvalidValue`` naming the field."""
    for each in fields(record):
        value, limits = getattr(record, each.name), each.metadata
        if not isinstance(value, int | float):
            continue
        within = (
            math.isfinite(value)
            and value >= limits.get("ge", -math.inf)
            and value > limits.get("gt", -math.inf)
            and value <= limits.get("le", math.inf)
            and value < limits.get("lt", math.inf)
        )
        if not within:
            raise InvalidValue(f"{subject}: {each.name} is {value}, {_range(limits)}")


def _range(limits: Any) -> str:
    lower = f"[{limits['ge']}" if "ge" in limits else f"({limits['gt']}" if "gt" in limits else "("
    upper = f"{limits['le']}]" if "le" in limits else f"{limits['lt']})" if "lt" in limits else ")"
    if len(upper) > 1:
        return f"outside {lower}, {upper}"
    if "gt" in limits:
        return f"must be above {limits['gt']}"
    return f"must be at least {limits['ge']}" if "ge" in limits else "must be finite"
