"""Which of the candidates a search found are verified on the held-out split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optimizer.search.constraints import Limits
from optimizer.search.goals import LEAST_LIMIT, is_within
from optimizer.search.pareto import Point, front_indices
from optimizer.search.space import Candidate
from optimizer.search.trial import OPTIMISM, GoalFigures, SearchOutcome, Trial
from workers.runtime import SkipPlan


def choose_finalists(outcome: SearchOutcome, limits: Limits, count: int) -> tuple[Candidate, ...]:
    """Choose at most ``count`` candidates to verify: of the front, from fastest to most careful, then runners-up.

    The dense plan, plans predicted to be no faster than it, and plans that could meet the constraint only against
    the evidence of the search are left out. Runners-up fill the places that a short front leaves, since its few plans
    may owe their rank to chance. Where the search split is small, many plans lose nothing on it and the front is the
    fastest of them: so runners-up are spread over the front of latency and divergence (KL), which tells careful plans
    from lucky ones. Without divergences they are the front without the plans chosen already. Of drafters, the front's
    that save at least half as much time as the fastest one are chosen evenly, then the fastest others.
    """
    if any(trial.drafter is not None for trial in outcome.trials):
        return _drafters(outcome, limits, count)
    eligible = [
        trial
        for trial in outcome.trials
        if trial.complete
        and _may_be_fast(trial, limits)
        and limits.keeps(trial, outcome.dense_accuracy, optimistic=True)
    ]
    front = _front(eligible, [trial.costs for trial in eligible])
    kept = [trial for trial in front if limits.keeps(trial, outcome.dense_accuracy, optimistic=False)]
    chosen = (kept or front)[:1] if count == 1 else _evenly(front, count)
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


def _drafters(outcome: SearchOutcome, limits: Limits, count: int) -> tuple[Candidate, ...]:
    """Choose among candidates that are expected to draft with gain, which any other cannot be worth verifying."""
    eligible = [trial for trial in outcome.trials if trial.complete and _may_be_fast(trial, limits)]
    eligible.sort(key=_time)
    if not eligible:
        return ()
    most = 1.0 - _time(eligible[0])
    front = [trial for trial in _front(eligible, [t.costs for t in eligible]) if 1.0 - _time(trial) >= most / 2]
    chosen = _evenly(front, count) if count > 1 else eligible[:1]
    chosen += [trial for trial in eligible if trial not in front][: count - len(chosen)]
    return tuple(trial.candidate for trial in chosen)


def _time(trial: Trial) -> float:
    assert trial.drafter is not None
    return trial.drafter.time


def why_none(outcome: SearchOutcome, limits: Limits) -> str:
    """Explain why :func:`choose_finalists` chooses none, with how near the nearest candidate came."""
    tried = [trial for trial in outcome.trials if not trial.candidate.is_dense]
    fast = [trial for trial in tried if _may_be_fast(trial, limits)]
    reasons = []
    drafters = [trial for trial in tried if trial.drafter is not None]
    if drafters:
        nearest = min(drafters, key=_time)
        reasons.append(
            f"{len(drafters)} are expected to save no time as drafters, or are outside the limits (the nearest, "
            f"{nearest.candidate}, takes {_time(nearest):.2f} of plain decoding's time per token)"
        )
    elif fast and limits.goals is not None:
        reasons.append(f"{len(fast)} lose more than allowed{_binding(fast, limits)}")
    elif fast:
        nearest = max(fast, key=lambda trial: trial.difference)
        reasons.append(
            f"{len(fast)} lose more accuracy than allowed (the nearest, {nearest.candidate}, is at "
            f"{100 * nearest.difference:+.2f} points to dense on {nearest.n_samples} search samples)"
        )
    if len(tried) > len(fast) and not drafters:
        reasons.append(f"{len(tried) - len(fast)} are predicted to be no faster than dense, or outside the limits")
    if outcome.failed:
        reasons.append(f"{len(outcome.failed)} failed (such as {failure_of(outcome)})")
    total = len(tried) + len(outcome.failed)
    return f"no plan that the search tried could meet the constraint: of {total}, {', '.join(reasons) or 'none ran'}"


def _binding(tried: Sequence[Trial], limits: Limits) -> str:
    """Say on which tasks the limits cannot be kept, and what could be had without them."""
    complete = [trial for trial in tried if trial.complete] or list(tried)
    parts = []
    for name in dict.fromkeys(each.name for trial in complete for each in trial.goals if each.limit is not None):
        losses = {trial: own for trial in complete if (own := _loss(trial, name)) is not None}
        nearest = min(losses, key=lambda trial: losses[trial].loss)
        least = losses[nearest]
        if least.loss - OPTIMISM * least.error <= (least.limit or 0.0):
            continue
        parts.append(f"on {name} none is within its limit (the nearest, {nearest.candidate}, {worded(least)})")
        others = [trial for trial in complete if _keeps_without(trial, name)]
        if others:
            fastest = min(others, key=lambda trial: trial.latency_ratio)
            parts.append(
                f"without {name}, {fastest.candidate} is predicted to run {1 / fastest.latency_ratio:.2f}x within "
                "the other limits"
            )
    if not parts:
        nearest = min(complete, key=lambda trial: -trial.difference)
        parts = [f"no plan keeps all limits at once (the nearest, {nearest.candidate}: {worst_of(nearest)})"]
    return f": {'; '.join(parts)}"


def _loss(trial: Trial, name: str) -> GoalFigures | None:
    return next((each for each in trial.goals if each.name == name), None)


def _keeps_without(trial: Trial, name: str) -> bool:
    """Whether a trial is plausibly within all limits but one."""
    return is_within(replace(trial, goals=tuple(each for each in trial.goals if each.name != name)), optimistic=True)


def worded(each: GoalFigures) -> str:
    """Write a loss beside its limit."""
    if each.is_text:
        return f"diverges by {each.loss:.3f} nats a token, limit {each.limit:g}"
    return f"loses {100 * each.loss:.2f} points, limit {100 * (each.limit or 0.0):.2f}"


def worst_of(trial: Trial) -> str:
    """Write the loss of a trial that is the largest share of its limit."""
    limited = [each for each in trial.goals if each.limit is not None]
    if not limited:
        return "no limit"
    worst = max(limited, key=lambda each: each.loss / max(LEAST_LIMIT, each.limit or 0.0))
    return f"on {worst.name} it {worded(worst)}"


def failure_of(outcome: SearchOutcome) -> str:
    """Name the first candidate that failed, and its reason."""
    candidate, reason = next(iter(outcome.failed.items()))
    return f"{candidate}: {reason}"


def _may_be_fast(trial: Trial, limits: Limits) -> bool:
    """Whether a candidate is predicted to be faster than dense and within the limits that need no evaluation."""
    time = trial.latency_ratio if trial.drafter is None else trial.drafter.time
    return time < 1.0 and limits.feasible(SkipPlan.parse(trial.plan), trial.latency_ratio)


def _front(trials: Sequence[Trial], costs: Sequence[Point]) -> list[Trial]:
    return [trials[index] for index in front_indices(costs)]


def _evenly(front: Sequence[Trial], count: int) -> list[Trial]:
    """At most ``count`` members at even steps with both ends; of one, the middle."""
    if len(front) <= count:
        return list(front)
    if count == 1:
        return [front[len(front) // 2]]
    return [front[round(position * (len(front) - 1) / (count - 1))] for position in range(count)]
