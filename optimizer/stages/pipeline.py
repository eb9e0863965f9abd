"""Run the stages of a job. Each stores its result, and a resumed job reads the finished ones back.

Those that need nothing of each other run together, so that all workers have something to do.
"""

from __future__ import annotations

from functools import partial

from optimizer.search.latency import LayerTimes
from optimizer.search.space import Candidate
from optimizer.stages import (
    collateral,
    compensate,
    dense,
    engine_latency,
    guard,
    measure,
    profile,
    publish,
    redundancy,
    search,
    speculate,
    verify,
)
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.publish import Published
from storage.queue import stages

_STAGE = "inputs"


def run(context: JobContext) -> Published:
    """Take a claimed job from the model to published plans. Raises JobFailed when a stage cannot be passed."""
    check_begun_alike(context, engine_latency.find_engine(context))
    speculate.require_drafting(context)
    compensate.require_text(context)
    try:
        latency, _, table = context.turns.together(
            partial(_profile, context), partial(dense.run, context), partial(redundancy.run, context)
        )
    except _OutOfReachError as nothing:
        return publish.none(context, str(nothing))
    outcome = search.run(context, latency, table)
    chosen = verify.choose(context, latency, outcome)
    if not chosen:
        return publish.none(context, verify.why_nothing(context, latency, outcome))
    if context.spec.is_lossless:
        finalists = verify.run(context, latency, chosen)
        drafted = speculate.run(context, finalists)
        latency_of = {candidate: found.latency for candidate, found in drafted.items()}
        beside = collateral.run(context, tuple(each for each in finalists if each.candidate in drafted))
        return publish.run(context, finalists, publish.Measured(latency_of, collateral=beside, speculation=drafted))
    # A single device has to be left alone while it is timed, by the driver's statistics too.
    before = verify.run(context, latency, chosen) if context.devices == 1 else None

    def verified() -> tuple[tuple[verify.Finalist, ...], dict[Candidate, collateral.Collateral]]:
        finalists = verify.run(context, latency, chosen) if before is None else before
        return finalists, collateral.run(context, finalists)

    (finalists, beside), measured, served, guards = context.turns.together(
        verified, *(partial(stage.run, context, chosen) for stage in (measure, engine_latency, guard))
    )
    return publish.run(context, finalists, publish.Measured(measured, served, beside, guards=guards))


class _OutOfReachError(Exception):
    """No plan can meet the job's limits on latency and cache."""


def _profile(context: JobContext) -> LayerTimes:
    latency = profile.run(context)
    nothing = search.out_of_reach(context, latency)
    if nothing is not None:
        raise _OutOfReachError(nothing)
    return latency


def check_begun_alike(context: JobContext, engine: str = "") -> None:
    """Record what the job is begun with. Raises JobFailed when an earlier attempt was begun with something else.

    What it stored stands for that: data, model files, a device or versions that changed would be mixed with it.
    """
    now = context.inputs.contents | {"device, dtype, attention and versions": context.settings}
    if engine:
        now["the engine"] = engine
    begun = stages.stages(context.db, context.job.id)
    if begun and _STAGE not in begun:
        changed = ["skipplan's way to identify a model"]
    else:
        before: dict[str, str] = context.load_or_compute(_STAGE, dict[str, str], lambda: now)
        changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        raise JobFailed(
            f"job {context.job.id} was begun before {', '.join(changed)} changed, and what it measured stands for the "
            "former; run or submit the job file again: a new job begins"
        )
