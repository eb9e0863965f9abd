"""Verify plans held-out: is a plan's difference to dense provably within the constraint?

Dense and plan answer the same held-out questions; the difference is resampled by image. With several finalists the
confidence of each interval is corrected (Holm), so that all accepted plans together hold at the job's confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimizer.job.result import Loss
from optimizer.job.sections import ConstraintSpec
from optimizer.search.space import Candidate
from optimizer.statistics.intervals import (
    Interval,
    bootstrap_difference,
    difference_interval,
    effective_sample_size,
    holm_confidences,
    mcnemar_exact,
    wilson_interval,
)
from workers.messages import NO_COMPENSATION
from workers.runtime import SkipPlan


@dataclass(frozen=True)
class DraftFigures:
    """Held-out figures of a drafter: the share of dense's own tokens that it would have drafted, with its interval."""

    acceptance: float
    acceptance_low: float
    acceptance_high: float
    n_samples: int
    draft_length: int
    """Tokens drafted in a round, at which the expected time is least."""
    tokens_per_round: float
    """Accepted tokens and the dense model's own one, at that length."""
    expected_time: float
    """Per token, as a share of plain decoding, by the latency profile."""


@dataclass(frozen=True)
class GoalVerdict(Loss):
    """Hold a plan's loss on one of its goals with what only its own job needs."""

    images: int
    """Of text, different passages."""
    mcnemar_p: float
    secondary: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """A plan's held-out figures. Accuracies and differences (plan minus dense, a loss is negative) are shares."""

    plan: str
    n_samples: int
    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    dense_accuracy: float
    difference: float
    difference_low: float
    """The lower end of the difference's interval is what the constraint is judged on."""
    difference_high: float
    confidence: float
    """Of the accuracy's interval, and of all finalists' verdicts together."""
    difference_confidence: float
    """Of this difference's two-sided interval, after Holm's correction for the number of finalists."""
    mcnemar_p: float
    accepted: bool
    """Whether the accuracy is within the limits; a plan that is also fast enough meets the constraint."""
    secondary: dict[str, float]
    compensation: str = NO_COMPENSATION
    drafting: DraftFigures | None = None
    """In a lossless job, where accuracies are dense's."""
    goals: tuple[GoalVerdict, ...] = ()
    """In a job that judges by several; the figures above are of the task on which most may have been lost."""

    @property
    def candidate(self) -> Candidate:
        """The plan with its compensation."""
        return Candidate(SkipPlan.parse(self.plan), self.compensation)


@dataclass(frozen=True)
class _Bound:
    """Interval of a difference at its Holm level, and whether it lies within the constraint."""

    interval: Interval
    confidence: float
    within: bool


@dataclass(frozen=True)
class Pairs:
    """Scores of dense and of a plan on the samples that neither failed on, and these samples' images."""

    dense: Sequence[float]
    plan: Sequence[float]
    groups: Sequence[str]

    @classmethod
    def of(cls, dense: Sequence[float], plan: Sequence[float], groups: Sequence[str]) -> Pairs:
        """Leave out what failed."""
        rows = [row for row in zip(dense, plan, groups, strict=True) if not math.isnan(row[0] + row[1])]
        return cls([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def verify(
    dense: Sequence[float],
    finalists: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    constraint: ConstraintSpec,
    *,
    seed: int,
    secondary: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Verdict, ...]:
    """Verify every finalist against dense on the same samples, given per-sample scores in [0, 1].

    ``groups`` names each sample's image. A sample that failed (NaN) under dense or the plan is left out for both.
    Raises ValueError when the scores do not belong to the same samples.
    """
    pairs = {plan: Pairs.of(dense, scores, groups) for plan, scores in finalists.items()}
    bounds = _bounds(pairs, constraint, seed)
    verdicts = []
    for plan, own in pairs.items():
        dense, scores, groups = own.dense, own.plan, own.groups
        n, bound = len(scores), bounds[plan]
        accuracy, dense_accuracy = math.fsum(scores) / n, math.fsum(dense) / n
        interval = wilson_interval(accuracy, effective_sample_size(scores, groups), constraint.confidence)
        accurate = constraint.min_accuracy is None or interval.low >= constraint.min_accuracy
        verdicts.append(
            Verdict(
                plan=plan,
                n_samples=n,
                images=len(set(groups)),
                accuracy=accuracy,
                accuracy_low=interval.low,
                accuracy_high=interval.high,
                dense_accuracy=dense_accuracy,
                difference=accuracy - dense_accuracy,
                difference_low=bound.interval.low,
                difference_high=bound.interval.high,
                confidence=constraint.confidence,
                difference_confidence=bound.confidence,
                mcnemar_p=mcnemar_exact(dense, scores),
                accepted=bound.within and accurate,
                secondary=dict((secondary or {}).get(plan, {})),
            )
        )
    return tuple(verdicts)


def least_provable_drop(groups: Sequence[str], constraint: ConstraintSpec, finalists: int, *, seed: int) -> float:
    """Return the largest loss that a plan which answers every sample as dense does may still have, as a share.

    It is taken at the level of the first of ``finalists`` in Holm's line, so where it exceeds the allowed drop no plan
    can be accepted that is not better than dense. ``groups`` names each held-out sample's image.
    """
    right = [1.0] * len(groups)
    level = holm_confidences([0.0] * finalists, constraint.confidence)[0]
    return -difference_interval(bootstrap_difference(right, right, groups, seed=seed), level).low


def _bounds(pairs: Mapping[str, Pairs], constraint: ConstraintSpec, seed: int) -> dict[str, _Bound]:
    differences = {
        plan: bootstrap_difference(each.dense, each.plan, each.groups, seed=seed) for plan, each in pairs.items()
    }
    least = -1.0 if constraint.max_accuracy_drop is None else -constraint.max_accuracy_drop
    # Evidence for "the loss exceeds the limit": the share of resamples in which it does. Equal shares (several of
    # zero) are put in order by how far their distributions lie from the limit.
    evidence = [float((drawn < least).mean()) - 1e-6 * float(drawn.mean()) for drawn in differences.values()]
    levels = dict(zip(differences, holm_confidences(evidence, constraint.confidence), strict=True))
    bounds: dict[str, _Bound] = {}
    line_ended = False
    for plan in sorted(differences, key=lambda plan: -levels[plan]):  # the strictest level first
        interval = difference_interval(differences[plan], levels[plan])
        line_ended = line_ended or interval.low < least  # the first that fails rejects all later ones too (Holm)
        bounds[plan] = _Bound(interval, levels[plan], not line_ended)
    return bounds
