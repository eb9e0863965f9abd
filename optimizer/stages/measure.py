"""Station 5: the finalists' latency on the live model, in interleaved pairs with dense, on one undisturbed worker."""

from __future__ import annotations

from functools import partial

from optimizer.stages.context import JobContext
from optimizer.verification import Verdict
from workers.messages import CompareLatency, Failure, LatencyComparison


def run(context: JobContext, verdicts: tuple[Verdict, ...]) -> dict[str, LatencyComparison]:
    """Measured speed-up by plan, each persisted as it comes, or read back."""
    context.progress.begin("measure latency", len(verdicts))
    measured: dict[str, LatencyComparison] = {}
    for verdict in verdicts:
        compare = partial(_compare, context, verdict.plan)
        comparison = context.once(f"measure {verdict.plan}", LatencyComparison | None, compare)
        if comparison is not None:
            measured[verdict.plan] = comparison
            context.progress.advance(news=f"{verdict.plan} {comparison.speedup:.2f}x")
    return measured


def _compare(context: JobContext, plan: str) -> LatencyComparison | None:
    request = CompareLatency(
        plan,
        workload=context.workload,
        precision=context.spec.latency_precision,
        confidence=context.spec.constraint.confidence,
        max_seconds=context.spec.latency_seconds,
        seed=context.spec.search.seed,
    )
    ((_, result),) = context.pool.run([request])
    if isinstance(result, Failure):
        context.progress.note(f"latency of plan {plan} could not be measured: {result.reason}")
        return None
    assert isinstance(result, LatencyComparison)
    return result
