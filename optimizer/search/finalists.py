"""Which of the candidates a search found are verified on the held-out split."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.pareto import front_indices
from optimizer.search.constraints import Limits
from optimizer.search.outcome import SearchOutcome, Tried
from optimizer.space import Candidate
from workers.runtime import SkipPlan


def choose_finalists(outcome: SearchOutcome, limits: Limits, count: int) -> tuple[Candidate, ...]:
    """At most ``count`` candidates to verify: spread over the front from fastest to most careful, then runners-up.

    The dense plan, plans predicted to be no faster than it, and plans that could meet the constraint only against
    the evidence of the search are left out. Runners-up (the front without the plans chosen already) fill the places
    that a short front leaves, since its few plans may owe their rank to chance.
    """
    largest = limits.largest_drop(outcome.dense_accuracy)
    eligible = [
        tried
        for tried in outcome.tried
        if tried.complete
        and tried.latency_ratio < 1.0
        and limits.possible(SkipPlan.parse(tried.plan), tried.latency_ratio)
        and tried.optimistic_drop <= largest
    ]
    chosen: list[Tried] = []
    while eligible and len(chosen) < count:
        front = [eligible[index] for index in front_indices([tried.costs for tried in eligible])]
        chosen += _spread(front, count - len(chosen), largest)
        eligible = [tried for tried in eligible if tried not in front]
    return tuple(tried.candidate for tried in chosen)


def _spread(front: Sequence[Tried], count: int, limit: float) -> list[Tried]:
    """At most ``count`` members of a front that is ordered by latency, at even steps with both ends."""
    if len(front) <= count:
        return list(front)
    if count == 1:
        return [next((tried for tried in front if tried.drop <= limit), front[0])]
    return [front[round(position * (len(front) - 1) / (count - 1))] for position in range(count)]
