"""Stage 6: time the finalists on the live model, in pairs interleaved with dense, each on an undisturbed worker."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext
from optimizer.stages.verify import Chosen
from workers.messages import CompareLatency, LatencyComparison


def run(context: JobContext, finalists: Sequence[Chosen]) -> dict[Candidate, LatencyComparison]:
    """Measure each finalist's speed-up, or read it back; one that cannot be measured is left out."""
    context.progress.begin("measure latency", len(finalists))
    measured = context.turns.together(*(partial(_measure, context, finalist) for finalist in finalists))
    return {
        finalist.candidate: comparison
        for finalist, comparison in zip(finalists, measured, strict=True)
        if comparison is not None
    }


def _measure(context: JobContext, finalist: Chosen) -> LatencyComparison | None:
    name, compare = str(finalist.candidate), partial(_compare, context, finalist)
    comparison: LatencyComparison | None = context.load_or_compute(f"measure {name}", LatencyComparison | None, compare)
    if comparison is not None:
        context.progress.advance(news=f"{name} {comparison.speedup:.2f}x")
    return comparison


def _compare(context: JobContext, finalist: Chosen) -> LatencyComparison | None:
    request = CompareLatency(
        finalist.candidate.plan.text,
        workload=context.workload,
        precision=context.spec.latency.precision,
        confidence=context.spec.constraint.confidence,
        max_seconds=context.spec.latency.max_seconds,
        seed=context.spec.search.seed,
        compensation=finalist.candidate.compensation,
        artifact=finalist.artifact,
    )
    result = context.ask_one(request, f"latency of plan {finalist.candidate}")
    assert result is None or isinstance(result, LatencyComparison)
    if result is not None:
        context.failed_samples.add("calibration", result.failed_samples)
    return result
