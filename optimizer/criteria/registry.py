"""Making the criterion of a name with its thresholds."""

from __future__ import annotations

from collections.abc import Mapping

from optimizer.errors import UsageFault
from optimizer.registries import CRITERIA, find

from .interface import Criterion


def load(name: str, thresholds: Mapping[str, float] | None = None) -> Criterion:
    """Make the criterion of that name with those thresholds, its own where none are given.

    Raises UsageFault when there is none, its class cannot be imported, or it has no such threshold.
    """
    kind: type[Criterion] = find(CRITERIA, name, "criterion")
    try:
        criterion: Criterion = kind(**dict(thresholds or {}))
    except TypeError:
        known, given = ", ".join(kind().thresholds) or "none", ", ".join(thresholds or {})
        raise UsageFault(f"thresholds: criterion {name} takes {known}, not {given}") from None
    except ValueError as error:
        raise UsageFault(f"thresholds: criterion {name}: {error}") from None
    return criterion
