"""Which of the candidates a search found are verified on the held-out split."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.search.constraints import Limits
from optimizer.search.pareto import Point, front_indices
from optimizer.search.space import Candidate
from optimizer.search.trial import SearchOutcome, Trial
from workers.runtime import SkipPlan


def choose_finalists(outcome: SearchOutcome, limits: Limits, count: int) -> tuple[Candidate, ...]:
    """Choose at most ``count`` candidates to verify: of the front, from fastest to most careful, then runners-up.

    The dense plan, plans predicted to be no faster than it, and plans that could meet the constraint only against
    the evidence of the search are left out. Runners-up fill the places that a short front leaves, since its few plans
    may owe their rank to chance. Where the search split is small, many plans lose nothing on it and the front is the
    fastest of them: so runners-up are spread over the front of latency and divergence (KL), which tells careful plans
    from lucky ones. Without divergences they are the front without the plans chosen already.
    """
    least = limits.least_difference(outcome.dense_accuracy)
    eligible = [
        trial
        for trial in outcome.trials
        if trial.complete
        and trial.latency_ratio < 1.0
        and limits.possible(SkipPlan.parse(trial.plan), trial.latency_ratio)
        and trial.optimistic_difference >= least
    ]
    front = _front(eligible, [trial.costs for trial in eligible])
    chosen = _spread(front, count, least)
    eligible = [trial for trial in eligible if trial not in front]
    while eligible and len(chosen) < count:
        divergences = [trial.kl for trial in eligible if trial.kl is not None]
        if len(divergences) == len(eligible):
            costs = [(trial.latency_ratio, kl) for trial, kl in zip(eligible, divergences, strict=True)]
        else:
            costs = [trial.costs for trial in eligible]
        front = _front(eligible, costs)
        chosen += _evenly(front, count - len(chosen))
        eligible = [trial for trial in eligible if trial not in front]
    return tuple(trial.candidate for trial in chosen)


def _front(trials: Sequence[Trial], costs: Sequence[Point]) -> list[Trial]:
    return [trials[index] for index in front_indices(costs)]


def _spread(front: Sequence[Trial], count: int, least: float) -> list[Trial]:
    """At most ``count`` members of a front that is ordered by latency; a single one keeps to the limit if any does."""
    if count == 1 and front:
        return [next((trial for trial in front if trial.difference >= least), front[0])]
    return _evenly(front, count)


def _evenly(front: Sequence[Trial], count: int) -> list[Trial]:
    """At most ``count`` members at even steps with both ends; of one, the middle."""
    if len(front) <= count:
        return list(front)
    if count == 1:
        return [front[len(front) // 2]]
    return [front[round(position * (len(front) - 1) / (count - 1))] for position in range(count)]
