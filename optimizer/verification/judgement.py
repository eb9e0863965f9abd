"""The held-out judgement: is a plan's loss of accuracy against dense provably within the constraint?

Dense and plan answer the same held-out questions; the difference is resampled by image. With several finalists the
confidence of each interval is corrected (Holm), so that all accepted plans together hold at the job's confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimizer.job.sections import ConstraintSpec
from optimizer.search.space import Candidate
from optimizer.verification.statistics import (
    Interval,
    bootstrap_drop,
    effective_sample_size,
    holm_confidences,
    mcnemar_exact,
    two_sided,
    wilson_interval,
)
from workers.messages import NO_COMPENSATION
from workers.runtime import SkipPlan


@dataclass(frozen=True)
class Verdict:
    """A plan's held-out figures. Drops are shares, positive where the plan is worse than dense."""

    plan: str
    n: int
    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    dense_accuracy: float
    drop: float
    drop_low: float
    drop_high: float
    """The upper end of the drop's interval is what the constraint is judged on."""
    confidence: float
    """Of the accuracy's interval, and of all finalists' judgements together."""
    drop_confidence: float
    """Of this drop's two-sided interval, after Holm's correction for the number of finalists."""
    mcnemar_p: float
    accepted: bool
    """Whether the accuracy part of the constraint is met."""
    secondary: dict[str, float]
    compensation: str = NO_COMPENSATION

    @property
    def candidate(self) -> Candidate:
        """What was judged."""
        return Candidate(SkipPlan.parse(self.plan), self.compensation)


def judge(
    dense: Sequence[float],
    finalists: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    constraint: ConstraintSpec,
    *,
    seed: int,
    secondary: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Verdict, ...]:
    """Judge every finalist against dense on the same samples, given per-sample scores in [0, 1].

    ``groups`` names each sample's image. Raises ValueError when the scores do not belong to the same samples.
    """
    distributions = {plan: bootstrap_drop(dense, scores, groups, seed=seed) for plan, scores in finalists.items()}
    limit = 1.0 if constraint.max_accuracy_drop is None else constraint.max_accuracy_drop
    # Evidence for "the drop exceeds the limit": the share of resamples in which it does. Equal shares (several of
    # zero) are put in order by how far their distributions lie from the limit.
    evidence = [float((drops > limit).mean()) + 1e-6 * float(drops.mean()) for drops in distributions.values()]
    levels = dict(zip(distributions, holm_confidences(evidence, constraint.confidence), strict=True))
    verdicts: dict[str, Verdict] = {}
    line_ended = False
    for plan in sorted(distributions, key=lambda plan: -levels[plan]):  # the strictest level first
        interval = two_sided(distributions[plan], levels[plan])
        line_ended = line_ended or interval.high > limit  # the first that fails rejects all later ones too (Holm)
        verdicts[plan] = _verdict(
            plan,
            dense,
            finalists[plan],
            groups,
            constraint,
            drop_interval=interval,
            level=levels[plan],
            within_drop=not line_ended,
            secondary=dict((secondary or {}).get(plan, {})),
        )
    return tuple(verdicts[plan] for plan in finalists)


def least_provable_drop(groups: Sequence[str], constraint: ConstraintSpec, finalists: int, *, seed: int) -> float:
    """The upper end of the drop's interval of a plan that answers every sample as dense does, as a share.

    It is taken at the level of the first of ``finalists`` in Holm's line, so where it exceeds the allowed drop no plan
    can be accepted that is not better than dense. ``groups`` names each held-out sample's image.
    """
    right = [1.0] * len(groups)
    level = holm_confidences([0.0] * finalists, constraint.confidence)[0]
    return two_sided(bootstrap_drop(right, right, groups, seed=seed), level).high


def _verdict(
    plan: str,
    dense: Sequence[float],
    scores: Sequence[float],
    groups: Sequence[str],
    constraint: ConstraintSpec,
    *,
    drop_interval: Interval,
    level: float,
    within_drop: bool,
    secondary: dict[str, float],
) -> Verdict:
    n = len(scores)
    accuracy, dense_accuracy = math.fsum(scores) / n, math.fsum(dense) / n
    interval = wilson_interval(accuracy, effective_sample_size(scores, groups), constraint.confidence)
    accurate = constraint.min_accuracy is None or interval.low >= constraint.min_accuracy
    return Verdict(
        plan=plan,
        n=n,
        images=len(set(groups)),
        accuracy=accuracy,
        accuracy_low=interval.low,
        accuracy_high=interval.high,
        dense_accuracy=dense_accuracy,
        drop=dense_accuracy - accuracy,
        drop_low=drop_interval.low,
        drop_high=drop_interval.high,
        confidence=constraint.confidence,
        drop_confidence=level,
        mcnemar_p=mcnemar_exact(dense, scores),
        accepted=within_drop and accurate,
        secondary=secondary,
    )
