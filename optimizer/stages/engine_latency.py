"""Serve the finalists in the job's engine, and time them in turns with dense; only where the job names an engine."""

from __future__ import annotations

from functools import partial

from optimizer.job.sections import TRANSFORMERS
from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.verify import Finalist
from workers.messages import CompareEngineLatency, EngineComparison, EngineFound, Failure, FindEngine

CONCURRENCIES = (1, 4, 16)
"""Measured beside the workload's own."""


def require_engine(context: JobContext) -> None:
    """Ask a worker for the engine before anything is computed.

    Raises JobFailed where it is not there, or does not serve the job's actions.
    """
    engine = context.spec.latency.engine
    if engine == TRANSFORMERS:
        return
    ((_, found),) = context.pool.run([FindEngine(engine)])
    if isinstance(found, Failure):
        raise JobFailed(f"latency.engine: {found.reason}")
    assert isinstance(found, EngineFound)
    if reason := context.spec.not_served(found.letters):
        raise JobFailed(reason)


def run(context: JobContext, finalists: tuple[Finalist, ...]) -> dict[Candidate, EngineComparison]:
    """Measure each finalist in the engine, or read it back; one that cannot be served is left out."""
    engine = context.spec.latency.engine
    if engine == TRANSFORMERS:
        return {}
    context.progress.begin(f"measure latency in {engine}", len(finalists))
    measured: dict[Candidate, EngineComparison] = {}
    for finalist in finalists:
        name, compare = str(finalist.candidate), partial(_compare, context, finalist)
        comparison = context.load_or_compute(f"measure {name} in {engine}", EngineComparison | None, compare)
        if comparison is not None:
            measured[finalist.candidate] = comparison
            speedups = ", ".join(f"{level.speedup:.2f}x at {level.concurrency}" for level in comparison.levels)
            context.progress.advance(news=f"{name} {speedups}")
    return measured


def _compare(context: JobContext, finalist: Finalist) -> EngineComparison | None:
    spec = context.spec
    request = CompareEngineLatency(
        finalist.candidate.plan.text,
        engine=spec.latency.engine,
        concurrencies=tuple(sorted({*CONCURRENCIES, spec.workload.concurrency})),
        workload=context.workload,
        precision=spec.latency.precision,
        confidence=spec.constraint.confidence,
        max_seconds=spec.latency.max_seconds,
        seed=spec.search.seed,
        compensation=finalist.candidate.compensation,
        artifact=finalist.artifact,
    )
    result = context.ask_one(request, f"latency of plan {finalist.candidate} in {spec.latency.engine}")
    assert result is None or isinstance(result, EngineComparison)
    if result is not None:
        context.failed_samples.add("calibration", result.failed_samples)
    return result
