"""Serve the finalists in the job's engine, and time them in turns with dense; only where the job names an engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from optimizer.job.sections import TRANSFORMERS
from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.verify import Chosen
from workers.messages import CompareEngineLatency, EngineComparison, EngineFound, Failure, FindEngine
from workers.runtime.plan import Action

CONCURRENCIES = (1, 4, 16)
"""Measured beside the workload's own."""


def find_engine(context: JobContext) -> str:
    """Ask a worker for the engine before anything is computed; return its name and versions, empty without an engine.

    Raises JobFailed where it is not there, cannot be asked about the job's model, or does not serve its actions.
    """
    engine = context.spec.latency.engine
    if engine == TRANSFORMERS:
        return ""
    ((_, found),) = context.run([FindEngine(engine)])
    if isinstance(found, Failure):
        raise JobFailed(f"latency.engine: {found.reason}")
    assert isinstance(found, EngineFound)
    if reason := context.spec.not_served(found.letters):
        raise JobFailed(reason)
    versions = " ".join(f"{name}={version}" for name, version in sorted(found.versions.items()))
    return f"{engine} {found.version} {versions}".strip()


def run(context: JobContext, finalists: Sequence[Chosen]) -> dict[Candidate, EngineComparison]:
    """Measure each finalist in the engine, or read it back.

    Raises JobFailed where one cannot be served: it may be the best, so that nothing is answered without it. The job
    goes on behind those that were measured when it is run again.
    """
    engine = context.spec.latency.engine
    if engine == TRANSFORMERS:
        return {}
    context.progress.begin(f"measure latency in {engine}", len(finalists))
    measured = context.turns.together(*(partial(_measure, context, finalist) for finalist in finalists))
    return {finalist.candidate: comparison for finalist, comparison in zip(finalists, measured, strict=True)}


def _measure(context: JobContext, finalist: Chosen) -> EngineComparison:
    name, engine = str(finalist.candidate), context.spec.latency.engine
    comparison = context.load_or_compute(
        f"measure {name} in {engine}", EngineComparison, partial(_compare, context, finalist)
    )
    speedups = ", ".join(f"{level.speedup:.2f}x at {level.concurrency}" for level in comparison.levels)
    context.progress.advance(news=f"{name} {speedups}")
    return comparison


def _compare(context: JobContext, finalist: Chosen) -> EngineComparison:
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
        compiled=not any(Action.of(letter).row.vision_only for letter in spec.letters),
        compensation=finalist.candidate.compensation,
        artifact=finalist.artifact,
    )
    ((_, result),) = context.run([request])
    if isinstance(result, Failure):
        raise JobFailed(f"plan {finalist.candidate} cannot be timed in {spec.latency.engine}: {result.reason}")
    assert isinstance(result, EngineComparison)
    context.failed_samples.add("calibration", result.failed_samples)
    return result
