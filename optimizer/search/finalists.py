"""Which of the candidates a search found are verified on the held-out split."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.search.constraints import Limits
from optimizer.search.pareto import Point, front_indices
from optimizer.search.space import Candidate
from optimizer.search.trial import SearchOutcome, Tried
from workers.runtime import SkipPlan


def choose_finalists(outcome: SearchOutcome, limits: Limits, count: int) -> tuple[Candidate, ...]:
    """At most ``count`` candidates to verify: spread over the front from fastest to most careful, then runners-up.

    The dense plan, plans predicted to be no faster than it, and plans that could meet the constraint only against
    the evidence of the search are left out. Runners-up fill the places that a short front leaves, since its few plans
    may owe their rank to chance. Where the search split is small, many plans lose nothing on it and the front is the
    fastest of them: so runners-up are spread over the front of latency and divergence (KL), which tells careful plans
    from lucky ones. Without divergences they are the front without the plans chosen already.
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
    front = _front(eligible, [tried.costs for tried in eligible])
    chosen = _spread(front, count, largest)
    eligible = [tried for tried in eligible if tried not in front]
    while eligible and len(chosen) < count:
        divergences = [tried.kl for tried in eligible if tried.kl is not None]
        if len(divergences) == len(eligible):
            costs = [(tried.latency_ratio, kl) for tried, kl in zip(eligible, divergences, strict=True)]
        else:
            costs = [tried.costs for tried in eligible]
        front = _front(eligible, costs)
        chosen += _evenly(front, count - len(chosen))
        eligible = [tried for tried in eligible if tried not in front]
    return tuple(tried.candidate for tried in chosen)


def _front(tried: Sequence[Tried], costs: Sequence[Point]) -> list[Tried]:
    return [tried[index] for index in front_indices(costs)]


def _spread(front: Sequence[Tried], count: int, limit: float) -> list[Tried]:
    """At most ``count`` members of a front that is ordered by latency; a single one keeps to the limit if any does."""
    if count == 1 and front:
        return [next((tried for tried in front if tried.drop <= limit), front[0])]
    return _evenly(front, count)


def _evenly(front: Sequence[Tried], count: int) -> list[Tried]:
    """At most ``count`` members at even steps with both ends; of one, the middle."""
    if len(front) <= count:
        return list(front)
    if count == 1:
        return [front[len(front) // 2]]
    return [front[round(position * (len(front) - 1) / (count - 1))] for position in range(count)]
