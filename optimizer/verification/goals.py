"""Verify plans held-out on everything that they are judged by: a plan holds only if every loss provably does.

A plan is accepted when each of its losses is within its limit at the plan's level, which needs no correction for the
number of losses (intersection-union test, Berger 1982); the level itself is corrected for the number of finalists
(Holm 1979). Differences of accuracy are resampled by image; the divergence on text is a mean over passages, with
Student's t interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to import

from optimizer.search.goals import Goal
from optimizer.search.space import Candidate
from optimizer.search.trial import Scores
from optimizer.statistics.intervals import (
    Interval,
    bootstrap_difference,
    difference_interval,
    effective_sample_size,
    holm_confidences,
    mcnemar_exact,
    wilson_interval,
)
from optimizer.verification.verdict import GoalVerdict, Pairs, Verdict


@dataclass(frozen=True)
class HeldOut:
    """A goal with dense's held-out scores on it, and the image (or passage) of each sample."""

    goal: Goal
    dense: Scores
    groups: Sequence[str]


@dataclass(frozen=True)
class _Divergence:
    """The divergence on text: mean over passages, its standard error, and their number."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, kl: Sequence[float]) -> _Divergence:
        known = np.array([value for value in kl if not math.isnan(value)])
        error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.inf
        return cls(float(known.mean()), error, len(known))

    def interval(self, confidence: float) -> Interval:
        half = float(stdtrit(max(1, self.n - 1), 0.5 + confidence / 2)) * self.error if self.error else 0.0
        return Interval(max(0.0, self.mean - half), self.mean + half)

    def exceeds(self, limit: float) -> float:
        """Return the p-value of a divergence as small as this where the true one is ``limit``."""
        if not self.error:
            return float(self.mean > limit)
        return float(stdtr(max(1, self.n - 1), (self.mean - limit) / self.error))


@dataclass(frozen=True)
class _OnGoal:
    """A finalist on one goal: its pairs with dense, and the distribution of its loss."""

    of: HeldOut
    pairs: Pairs
    drawn: NDArray[np.float64] | None
    divergence: _Divergence | None
    secondary: Mapping[str, float] = field(default_factory=dict)

    def evidence(self) -> float:
        """Return how much speaks against the loss being within its limit, as a p-value; 0 where there is no limit."""
        limit = self.of.goal.max_loss
        if limit is None:
            return 0.0
        if self.divergence is not None:
            return self.divergence.exceeds(limit)
        assert self.drawn is not None
        return float((self.drawn < -limit).mean()) - 1e-6 * float(self.drawn.mean())

    def verdict(self, level: float, confidence: float) -> GoalVerdict:
        """Judge the loss at the plan's level; the accuracy's own interval has the job's confidence."""
        goal, pairs = self.of.goal, self.pairs
        n = len(pairs.plan)
        accuracy, dense_accuracy = math.fsum(pairs.plan) / n, math.fsum(pairs.dense) / n
        own = wilson_interval(accuracy, effective_sample_size(pairs.plan, pairs.groups), confidence)
        if self.divergence is not None:
            loss, interval = self.divergence.mean, self.divergence.interval(level)
        else:
            assert self.drawn is not None
            difference = difference_interval(self.drawn, level)
            loss, interval = dense_accuracy - accuracy, Interval(-difference.high, -difference.low)
        within = goal.max_loss is None or interval.high <= goal.max_loss
        return GoalVerdict(
            name=goal.name,
            n_samples=n,
            images=len(set(pairs.groups)),
            accuracy=accuracy,
            accuracy_low=own.low,
            accuracy_high=own.high,
            dense_accuracy=dense_accuracy,
            loss=loss,
            loss_low=interval.low,
            loss_high=interval.high,
            max_loss=goal.max_loss,
            min_accuracy=goal.min_accuracy,
            weight=goal.weight,
            is_text=goal.is_text,
            within=within and (goal.min_accuracy is None or own.low >= goal.min_accuracy),
            mcnemar_p=mcnemar_exact(pairs.dense, pairs.plan),
            secondary=dict(self.secondary),
        )


def verify_goals(
    held_out: Sequence[HeldOut],
    finalists: Mapping[Candidate, Mapping[str, Scores]],
    confidence: float,
    *,
    seed: int,
    secondary: Mapping[Candidate, Mapping[str, Mapping[str, float]]] | None = None,
) -> tuple[Verdict, ...]:
    """Verify every finalist against dense on every goal, given its scores by the goal's name.

    A sample that failed (NaN) under dense or the plan is left out for both. The published accuracy and difference are
    those of the task on which the plan may have lost most, so that a limit on it holds on every task.
    """
    by_plan = {
        candidate: [
            _on_goal(of, scores[of.goal.name], seed, (secondary or {}).get(candidate, {}).get(of.goal.name, {}))
            for of in held_out
        ]
        for candidate, scores in finalists.items()
    }
    evidence = [max(each.evidence() for each in own) for own in by_plan.values()]
    levels = dict(zip(by_plan, holm_confidences(evidence, confidence), strict=True))
    found: dict[Candidate, Verdict] = {}
    line_ended = False
    for candidate in sorted(by_plan, key=lambda candidate: -levels[candidate]):  # the strictest level first
        goals = tuple(each.verdict(levels[candidate], confidence) for each in by_plan[candidate])
        bounded = all(each.max_loss is None or each.loss_high <= each.max_loss for each in goals)
        line_ended = line_ended or not bounded  # the first that fails rejects all later ones too (Holm)
        accepted = not line_ended and all(each.within for each in goals)
        found[candidate] = _verdict(candidate, goals, levels[candidate], confidence, accepted=accepted)
    return tuple(found[candidate] for candidate in finalists)


def _on_goal(of: HeldOut, scores: Scores, seed: int, secondary: Mapping[str, float]) -> _OnGoal:
    pairs = Pairs.of(of.dense.values, scores.values, of.groups)
    if of.goal.is_text:
        return _OnGoal(of, pairs, None, _Divergence.of(scores.kl or ()), secondary)
    return _OnGoal(of, pairs, bootstrap_difference(pairs.dense, pairs.plan, pairs.groups, seed=seed), None, secondary)


def _verdict(
    candidate: Candidate, goals: tuple[GoalVerdict, ...], level: float, confidence: float, *, accepted: bool
) -> Verdict:
    worst = max((each for each in goals if each.weight), key=lambda each: each.loss_high)
    return Verdict(
        plan=candidate.plan.text,
        compensation=candidate.compensation,
        n_samples=worst.n_samples,
        images=worst.images,
        accuracy=worst.accuracy,
        accuracy_low=worst.accuracy_low,
        accuracy_high=worst.accuracy_high,
        dense_accuracy=worst.dense_accuracy,
        difference=-worst.loss,
        difference_low=-worst.loss_high,
        difference_high=-worst.loss_low,
        confidence=confidence,
        difference_confidence=level,
        mcnemar_p=worst.mcnemar_p,
        accepted=accepted,
        secondary=worst.secondary,
        goals=goals,
    )
