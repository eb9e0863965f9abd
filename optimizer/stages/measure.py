"""Stage 5: time the finalists on the live model, in pairs interleaved with dense, on one undisturbed worker."""

from __future__ import annotations

from functools import partial

from optimizer.search.space import Candidate
from optimizer.stages import compensate
from optimizer.stages.context import JobContext
from optimizer.verification.judgement import Verdict
from workers.messages import CompareLatency, Failure, LatencyComparison


def run(context: JobContext, verdicts: tuple[Verdict, ...]) -> dict[Candidate, LatencyComparison]:
    """Measured speed-up by candidate, each persisted as it comes, or read back."""
    context.progress.begin("measure latency", len(verdicts))
    measured: dict[Candidate, LatencyComparison] = {}
    for verdict in verdicts:
        candidate = verdict.candidate
        compare = partial(_compare, context, candidate)
        comparison = context.once(f"measure {candidate}", LatencyComparison | None, compare)
        if comparison is not None:
            measured[candidate] = comparison
            context.progress.advance(news=f"{candidate} {comparison.speedup:.2f}x")
    return measured


def _compare(context: JobContext, candidate: Candidate) -> LatencyComparison | None:
    kept = compensate.run(context, [candidate]).get(candidate)
    request = CompareLatency(
        candidate.plan.text,
        workload=context.workload,
        precision=context.spec.latency_precision,
        confidence=context.spec.constraint.confidence,
        max_seconds=context.spec.latency_seconds,
        seed=context.spec.search.seed,
        compensation=candidate.compensation,
        artifact=None if kept is None else kept.artifact,
    )
    ((_, result),) = context.pool.run([request])
    if isinstance(result, Failure):
        context.progress.note(f"latency of plan {candidate} could not be measured: {result.reason}")
        return None
    assert isinstance(result, LatencyComparison)
    return result
