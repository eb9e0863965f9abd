"""Measure the harm of plans: scores and divergences on held-out samples, against dense on the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.search.space import Candidate
from optimizer.stages.cached_evaluation import CachedEvaluation
from optimizer.stages.context import JobContext, JobFailed
from optimizer.statistics.intervals import bootstrap_difference, difference_interval
from workers.runtime import SkipPlan

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PlanHarm:
    """A plan against dense on the same held-out samples; ``difference`` is paired, a loss is negative."""

    plan: str
    accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    kl: float | None
    """Nats, over the answer's tokens; None where the evaluation path does not measure it."""


@dataclass(frozen=True)
class Measured:
    """Per-sample results of plans on the same held-out samples."""

    images: tuple[str, ...]
    dense: Floats
    scores: dict[str, Floats]
    kl: dict[str, Floats]
    """Divergences, on the samples where every plan has one."""
    kl_images: tuple[str, ...]
    """Images of these samples."""
    failed: dict[str, str]

    def harm(self, plan: str, confidence: float, seed: int) -> PlanHarm | None:
        """Return a plan's figures; None where it could not be evaluated."""
        scores = self.scores.get(plan)
        if scores is None:
            return None
        differences = bootstrap_difference(self.dense.tolist(), scores.tolist(), self.images, seed=seed)
        interval = difference_interval(differences, confidence)
        divergence = self.kl.get(plan)
        return PlanHarm(
            plan,
            float(scores.mean()),
            float((scores - self.dense).mean()),
            interval.low,
            interval.high,
            None if divergence is None else float(divergence.mean()),
        )


def measure(context: JobContext, plans: Sequence[str], samples: int, split: str = "held_out") -> Measured:
    """Evaluate plans and dense on the first ``samples`` of a split; what is known already is not run again.

    Raises JobFailed when the dense model cannot be evaluated.
    """
    layers = context.worker.num_layers
    wanted = list(dict.fromkeys([str(SkipPlan.dense(layers).text), *plans]))
    context.progress.begin(f"evaluate {split}", len(wanted))
    scores: dict[str, Floats] = {}
    divergences: dict[str, Floats] = {}
    failed: dict[str, str] = {}
    evaluate = CachedEvaluation(context, split)
    for candidate, result in evaluate([(Candidate(SkipPlan.parse(text)), samples) for text in wanted]):
        plan = candidate.plan
        context.progress.advance()
        if result.failure is not None:
            failed[plan.text] = result.failure
            continue
        scores[plan.text] = np.asarray(result.values, dtype=np.float64)
        if result.kl is not None:
            divergences[plan.text] = np.asarray(result.kl, dtype=np.float64)
    dense = scores.get(wanted[0])
    if dense is None:
        raise JobFailed(f"the dense model cannot be evaluated: {failed[wanted[0]]}")
    images = [sample.image_key for sample in context.task.split(split)[:samples]]
    answered = _without_nan(scores)
    compared = answered & _without_nan(divergences)  # NaN logits under one plan say nothing about its divergence
    return Measured(
        images=_where(answered, images),
        dense=dense[answered],
        scores={plan: values[answered] for plan, values in scores.items()},
        kl={plan: values[compared] for plan, values in divergences.items() if compared.any()},
        kl_images=_where(compared, images),
        failed=failed,
    )


def _without_nan(values: Mapping[str, Floats]) -> NDArray[np.bool_]:
    """Which samples have a number under every plan; all where there are no plans."""
    return np.asarray(~np.isnan(np.stack([*values.values()])).any(0)) if values else np.ones(1, dtype=np.bool_)


def _where(kept: NDArray[np.bool_], images: Sequence[str]) -> tuple[str, ...]:
    return tuple(image for image, wanted in zip(images, kept, strict=True) if wanted)
