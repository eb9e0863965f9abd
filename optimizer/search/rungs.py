"""Rungs: growing prefixes of the search split, the same samples for every candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optimizer.search.constraints import Limits
from optimizer.search.trial import OPTIMISM, Tried
from workers.runtime import SkipPlan


def rung_sizes(rungs: Sequence[int] | None, samples: int) -> tuple[int, ...]:
    """Prefix sizes of the search split, the last one the whole split; by default a quarter, then everything."""
    sizes = rungs if rungs is not None else (math.ceil(samples / 4),)
    return (*(size for size in sizes if size < samples), samples)


def promising(tried: Tried, front: Sequence[Tried], limits: Limits, dense_accuracy: float) -> bool:
    """Whether a candidate could meet the constraints and be on the front once more samples were seen.

    Both are judged from the optimistic end of its drop's interval: a plan is given up only where the samples speak
    against it.
    """
    if tried.optimistic_drop > limits.largest_drop(dense_accuracy):
        return False
    if not limits.possible(SkipPlan.parse(tried.plan), tried.latency_ratio):
        return False
    return not any(
        other.latency_ratio <= tried.latency_ratio and other.drop + OPTIMISM * other.drop_error < tried.optimistic_drop
        for other in front
    )
