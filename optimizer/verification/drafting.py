"""Verify drafters on the held-out split: acceptance with its interval, and what it makes of time and rounds.

Their answers are the dense model's, so that accuracy is dense's and the difference to it is none; that this is so is
checked where speculation itself is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimizer.job.sections import ConstraintSpec
from optimizer.search.drafting import StepCosts
from optimizer.search.space import Candidate
from optimizer.statistics.intervals import (
    bootstrap_difference,
    difference_interval,
    effective_sample_size,
    wilson_interval,
)
from optimizer.verification.verdict import DraftFigures, Verdict
from workers.evaluation.acceptance import rounds_by_length


@dataclass(frozen=True)
class Drafted:
    """A finalist's acceptance by held-out sample (NaN: failed), and the means of its rounds."""

    acceptance: Sequence[float]
    means: Mapping[str, float]


@dataclass(frozen=True)
class DenseFigures:
    """Scores of dense's own held-out answers (NaN: failed) under the task's metric, and its secondary metrics."""

    scores: Sequence[float]
    secondary: Mapping[str, float]


def verify_drafters(
    dense: DenseFigures,
    finalists: Mapping[Candidate, Drafted],
    groups: Sequence[str],
    constraint: ConstraintSpec,
    costs: StepCosts,
    *,
    seed: int,
) -> tuple[Verdict, ...]:
    """Verify every finalist on the same held-out samples; ``groups`` names each sample's image.

    The acceptance's interval resamples whole images, as that of a difference does elsewhere.
    """
    rows = [(score, group) for score, group in zip(dense.scores, groups, strict=True) if not math.isnan(score)]
    scores, images = [row[0] for row in rows], [row[1] for row in rows]
    accuracy = math.fsum(scores) / len(scores)
    interval = wilson_interval(accuracy, effective_sample_size(scores, images), constraint.confidence)
    return tuple(
        Verdict(
            plan=candidate.plan.text,
            compensation=candidate.compensation,
            n_samples=len(scores),
            images=len(set(images)),
            accuracy=accuracy,
            accuracy_low=interval.low,
            accuracy_high=interval.high,
            dense_accuracy=accuracy,
            difference=0.0,
            difference_low=0.0,
            difference_high=0.0,
            confidence=constraint.confidence,
            difference_confidence=constraint.confidence,
            mcnemar_p=1.0,
            accepted=True,
            secondary=dict(dense.secondary),
            drafting=_figures(candidate, own, groups, constraint.confidence, costs, seed),
        )
        for candidate, own in finalists.items()
    )


def _figures(
    candidate: Candidate, own: Drafted, groups: Sequence[str], confidence: float, costs: StepCosts, seed: int
) -> DraftFigures:
    rows = [(each, group) for each, group in zip(own.acceptance, groups, strict=True) if not math.isnan(each)]
    shares, images = [row[0] for row in rows], [row[1] for row in rows]
    distribution = bootstrap_difference([1.0] * len(shares), shares, images, seed=seed)
    interval = difference_interval(distribution, confidence)
    time, length = costs.time(costs.step(candidate.plan), own.means)
    counted = rounds_by_length(own.means)
    return DraftFigures(
        acceptance=math.fsum(shares) / len(shares),
        acceptance_low=1.0 + interval.low,
        acceptance_high=min(1.0, 1.0 + interval.high),
        n_samples=len(shares),
        draft_length=length,
        tokens_per_round=1.0 / counted[length - 1][0] if counted else 1.0,
        expected_time=time,
    )
