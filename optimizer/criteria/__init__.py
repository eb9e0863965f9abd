"""Criteria: functions from measurements to a predicted risk for every layer and action.

``load("skip-it")`` gives one by name; ``optimizer.registries.CRITERIA`` lists them, and those of other packages. Search
seeds come from the risk; what is published is always measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from optimizer.errors import UsageFault
from optimizer.registries import CRITERIA, find
from workers.redundancy.kinds import PER_OPERATOR
from workers.runtime import Action

from .interface import Criterion, Risk

__all__ = ["Criterion", "Risk", "kinds_for", "load"]


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


def kinds_for(criterion: Criterion, letters: str) -> tuple[str, ...]:
    """Return the kinds of measurement that a criterion reads for actions, by their letters.

    Where some leave out a part of a layer, those that say the same of attention and of the MLP are among them.
    """
    parts = any(Action.of(letter).row.leaves_out for letter in letters)
    also = [PER_OPERATOR[kind] for kind in criterion.needs if parts and kind in PER_OPERATOR]
    return tuple(dict.fromkeys([*criterion.needs, *also]))
