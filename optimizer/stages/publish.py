"""Stage 8: publish what was verified and measured, and choose the plan that answers the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from optimizer.job.sections import TRANSFORMERS, ConstraintSpec
from optimizer.job.spec import JobSpec
from optimizer.search.space import Candidate, touched
from optimizer.stages import dense, guard, speculate
from optimizer.stages.collateral import Collateral
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.guard import Guards
from optimizer.stages.verify import Finalist
from optimizer.verification.verdict import GoalVerdict, Verdict
from storage.pareto import Group
from storage.records import lookup, plans
from storage.records.engine_latencies import EngineLatency
from storage.records.plans import PlanFigures
from workers.messages import EngineComparison, EngineLevel, LatencyComparison, SpeculationComparison
from workers.runtime import SkipPlan


@dataclass(frozen=True)
class Measured:
    """Hold the measurements of the verified plans by candidate: on the live model, in an engine, elsewhere; and guards.

    In a lossless job ``speculation`` has what ``latency`` has, and more.
    """

    latency: Mapping[Candidate, LatencyComparison]
    in_engine: Mapping[Candidate, EngineComparison] = field(default_factory=dict)
    collateral: Mapping[Candidate, Collateral] = field(default_factory=dict)
    speculation: Mapping[Candidate, SpeculationComparison] = field(default_factory=dict)
    guards: Guards = field(default_factory=Guards)


@dataclass(frozen=True)
class Speed:
    """Hold a plan's speed-up and seconds as the job judges them: of the live model, or of its engine."""

    latency: LatencyComparison
    speedup: float
    low: float
    """Lower end of the speed-up's interval."""
    seconds: float
    """Of a request."""
    engine: str = TRANSFORMERS

    @classmethod
    def of(cls, latency: LatencyComparison, served: EngineComparison | None, concurrency: int) -> Speed:
        """Take the engine's figures where there are some. Raises JobFailed where it served on another device."""
        if served is None:
            return cls(latency, latency.speedup, latency.speedup_low, latency.latency_seconds)
        if served.device != latency.device:
            raise JobFailed(
                f"plan {latency.plan} was timed on {latency.device} and served on {served.device}; name workers of one "
                "kind of device"
            )
        level = next(each for each in served.levels if each.concurrency == concurrency)
        return cls(latency, level.speedup, level.speedup_low, level.plan.latency_seconds, served.engine)


@dataclass(frozen=True)
class Published:
    """The ids of a job's published plans, and the one that meets the constraint at the largest measured speed-up."""

    plan_ids: tuple[int, ...]
    best: int | None
    reason: str
    """Why no plan is the answer; empty when one is."""


def run(context: JobContext, finalists: tuple[Finalist, ...], measured: Measured) -> Published:
    """Publish every verified and measured plan, whether it meets the job's constraint or not."""
    context.progress.begin("publish", 1)
    published = context.load_or_compute("publish", Published, lambda: _publish(context, finalists, measured))
    context.progress.advance()
    return published


def none(context: JobContext, reason: str) -> Published:
    """Record that no plan is the answer, where that is known before any is verified."""
    return context.load_or_compute("publish", Published, lambda: Published((), None, reason))


def _publish(context: JobContext, finalists: tuple[Finalist, ...], measured: Measured) -> Published:
    constraint = context.spec.constraint
    timed_plans = [each for each in finalists if each.candidate in measured.latency]
    if not timed_plans:
        raise JobFailed(f"none of the {len(finalists)} verified plans could be timed")
    inexact = {each.candidate: _inexact_beside(context, each.candidate, measured) for each in timed_plans}
    complete = [
        (each, _speed(context, each.candidate, measured)) for each in timed_plans if not inexact[each.candidate]
    ]
    if not complete:
        raise JobFailed(inexact[timed_plans[0].candidate])
    verdict = complete[0][0].verdict
    accuracies = {each.name: (each.dense_accuracy, each.n_samples) for each in verdict.goals}
    warning = dense.warning_of(context, accuracies or {context.task.name: (verdict.dense_accuracy, verdict.n_samples)})
    rows: dict[Candidate, plans.Plan] = {}
    for device in dict.fromkeys(speed.latency.device for _, speed in complete):  # a job may go on on another one
        timed = [each for each in complete if each[1].latency.device == device]
        published = plans.publish(
            context.db,
            context.job,
            Group(
                context.model_id,
                context.task_id,
                lookup.ensure_device(context.db, device),
                context.workload_name,
                context.spec.mode,
            ),
            figures=[figures(finalist, speed, context.spec, measured, warning) for finalist, speed in timed],
        )
        rows |= {finalist.candidate: row for (finalist, _), row in zip(timed, published, strict=True)}
    meeting = [
        (speed.speedup, finalist.verdict.difference, rows[finalist.candidate].id)
        for finalist, speed in complete
        if finalist.verdict.accepted and fast_enough(speed, constraint)
    ]
    plan_ids = tuple(rows[finalist.candidate].id for finalist, _ in complete)
    if meeting:
        _, _, best = max(meeting, key=lambda each: each[:2])
        return Published(plan_ids, best, "")
    return Published(plan_ids, None, _why_none([(each.verdict, speed) for each, speed in complete], constraint))


def _inexact_beside(context: JobContext, candidate: Candidate, measured: Measured) -> str:
    """Note and return that a drafter gave other answers than dense on prompts of other tasks or of text; else empty."""
    beside = measured.collateral.get(candidate)
    for name, found in beside.off_task.items() if beside is not None else ():
        if reason := speculate.inexact(found.exactness):
            note = f"plan {candidate} is not published: on {name} {reason}"
            context.progress.note(note)
            return note
    return ""


def _speed(context: JobContext, candidate: Candidate, measured: Measured) -> Speed:
    """Return what the job judges a plan's speed by."""
    served = measured.in_engine.get(candidate)
    return Speed.of(measured.latency[candidate], served, context.spec.workload.concurrency)


def _why_none(complete: Sequence[tuple[Verdict, Speed]], constraint: ConstraintSpec) -> str:
    """Explain why no plan is the answer, and how near the nearest came."""
    accurate = sum(verdict.accepted for verdict, _ in complete)
    fast = sum(fast_enough(speed, constraint) for _, speed in complete)
    engine = complete[0][1].engine
    where = "" if engine == TRANSFORMERS else f" in {engine}"
    goals = complete[0][0].goals
    samples = sum(each.n_samples for each in goals) if goals else complete[0][0].n_samples
    reason = (
        f"no plan meets the constraint: of {len(complete)} verified on {samples} held-out samples, "
        f"{accurate} surely keep {'all limits' if goals else 'the accuracy'} and {fast} are surely fast enough{where}"
    )
    if not accurate and goals:
        return f"{reason}; {_missed(complete, constraint)}"
    if not accurate:
        nearest = max((verdict for verdict, _ in complete), key=lambda verdict: verdict.difference_low)
        difference, low = round(100 * nearest.difference, 2) + 0.0, 100 * nearest.difference_low
        return f"{reason}; the nearest, {nearest.plan}, is at {difference:+.2f} points to dense, {low:+.2f} at worst"
    if not fast:
        quickest, speed = max(complete, key=lambda each: each[1].low)
        return f"{reason}; the fastest, {quickest.plan}, is {speed.low:.2f} times as fast at worst"
    return f"{reason}, none is both"


def _missed(complete: Sequence[tuple[Verdict, Speed]], constraint: ConstraintSpec) -> str:
    """Say on what each limit is missed by all plans, and which plan is the nearest; and what holds on the others."""
    verdicts = [verdict for verdict, _ in complete]
    parts, missed = [], []
    for number, goal in enumerate(verdicts[0].goals):
        if any(verdict.goals[number].within for verdict in verdicts):
            continue
        nearest = min(verdicts, key=lambda verdict: verdict.goals[number].loss_high)
        missed.append(goal.name)
        parts.append(f"on {goal.name} none is within its limit ({nearest.plan} {at_worst(nearest.goals[number])})")
    if not missed:
        nearest = max(verdicts, key=lambda verdict: sum(goal.within for goal in verdict.goals))
        outside = "; ".join(f"on {goal.name} it {at_worst(goal)}" for goal in nearest.goals if not goal.within)
        outside = outside or "it keeps them, but not at the level that as many finalists ask for (Holm)"
        return f"each limit is kept by some, all of them by none; the nearest, {nearest.plan}: {outside}"
    others = [
        f"{verdict.plan} ({speed.speedup:.2f}x)"
        for verdict, speed in complete
        if fast_enough(speed, constraint) and all(goal.within or goal.name in missed for goal in verdict.goals)
    ]
    if others:
        parts.append(f"without {' and '.join(missed)}, {', '.join(others)} would be within the limits")
    return "; ".join(parts)


def at_worst(goal: GoalVerdict) -> str:
    """Write a held-out loss with the end of its interval that is judged, and its limit."""
    if goal.is_text:
        limit = "" if goal.max_loss is None else f", limit {goal.max_loss:g}"
        return f"diverges by {goal.loss:.3f} nats a token, {goal.loss_high:.3f} at worst{limit}"
    limits = [] if goal.max_loss is None else [f"limit {100 * goal.max_loss:.2f}"]
    if goal.min_accuracy is not None:
        limits.append(f"accuracy {goal.accuracy:.3f}, {goal.accuracy_low:.3f} at worst, least {goal.min_accuracy:g}")
    return ", ".join([f"loses {100 * goal.loss:.2f} points, {100 * goal.loss_high:.2f} at worst", *limits])


def fast_enough(speed: Speed, constraint: ConstraintSpec) -> bool:
    """Tell whether measured latency and cache are within the constraint; a plan must at least surely beat dense.

    The speed-up is judged by the lower end of its interval, milliseconds by the median request.
    """
    if constraint.max_latency_ms is not None and 1000 * speed.seconds > constraint.max_latency_ms:
        return False
    if constraint.max_kv_cache_bytes is not None and speed.latency.kv_cache_bytes > constraint.max_kv_cache_bytes:
        return False
    return speed.low >= constraint.min_speedup if constraint.min_speedup else speed.low > 1.0


def figures(finalist: Finalist, speed: Speed, spec: JobSpec, measured: Measured, warning: str = "") -> PlanFigures:
    """Put the published figures of a plan together. Differences are accuracies less dense's, so a loss is negative."""
    verdict, kept, latency = finalist.verdict, finalist.maps, speed.latency
    constraint, concurrency = spec.constraint, spec.workload.concurrency
    beside, served = measured.collateral.get(finalist.candidate), measured.in_engine.get(finalist.candidate)
    drafted = measured.speculation.get(finalist.candidate)
    guarded = guard.figures(measured.guards, finalist.candidate, latency, constraint.confidence)
    fitted = (
        None
        if kept is None
        else {
            "gaps": [asdict(gap) for gap in kept.gaps],
            "tokens": kept.tokens,
            "text_tokens": kept.text_tokens,
        }
    )
    return PlanFigures(
        **_shared(verdict) | _shared(latency),
        artifact=None if kept is None else kept.artifact.location,
        artifact_checksum=None if kept is None else kept.artifact.checksum,
        layers_touched=touched(SkipPlan.parse(verdict.plan)),
        extra_bytes=None if drafted is None else drafted.extra_bytes,
        engine_latencies=() if served is None else tuple(_in_engine(served, level) for level in served.levels),
        secondary={
            "metrics": verdict.secondary,
            "images": verdict.images,
            "difference_confidence": verdict.difference_confidence,
            "mcnemar_p": verdict.mcnemar_p,
            "meets_constraint": verdict.accepted and fast_enough(speed, constraint),
            **({"goals": [asdict(goal) for goal in verdict.goals]} if verdict.goals else {}),
            **({} if served is None else {"judged_by": {"engine": served.engine, "concurrency": concurrency}}),
            "latency_pairs": latency.pairs,
            "peak_bytes": {"dense": latency.dense_peak_bytes, "plan": latency.peak_bytes},
            **({} if fitted is None else {"compensation": fitted}),
            **({} if beside is None or drafted is not None else {"collateral": _beside(beside)}),
            **({} if drafted is None else {"lossless": lossless(verdict, drafted, beside)}),
            **({"guard": guarded} if guarded else {}),
            **({"dense_warning": warning} if warning else {}),
        },
    )


def _beside(beside: Collateral) -> dict[str, Any]:
    return {name: value for name, value in asdict(beside).items() if name != "off_task"}


def lossless(verdict: Verdict, drafted: SpeculationComparison, beside: Collateral | None) -> dict[str, Any]:
    """Return what is published of a drafter beyond the figures that every plan has."""
    assert verdict.drafting is not None
    measured = {name: value for name, value in asdict(drafted).items() if name not in ("latency", "exactness")}
    own = asdict(verdict.drafting)
    # Published is the acceptance on the held-out split; that on the timed prompts, the first of them, is beside it.
    measured["acceptance_timed"] = measured.pop("acceptance")
    off_task = {} if beside is None else {name: _exact(asdict(found)) for name, found in beside.off_task.items()}
    return {
        **own,
        **measured,
        "accepted_per_round": drafted.accepted / max(1, drafted.rounds),
        **_exact({"exactness": asdict(drafted.exactness)}),
        "off_task": off_task,
    }


def _exact(figures: dict[str, Any]) -> dict[str, Any]:
    """Replace names of prompts and near ties by their number; answers that differ elsewhere are never published."""
    exactness = figures.pop("exactness")
    return figures | {"answers_compared": len(exactness["prompts"]), "near_ties": len(exactness["near_ties"])}


def _in_engine(served: EngineComparison, level: EngineLevel) -> EngineLatency:
    """Flatten what was measured at one concurrency, dense's under ``dense_``."""
    names = {each.name for each in fields(EngineLatency)}
    shared = {name: getattr(source, name) for source in (served, level) for name in vars(source).keys() & names}
    dense = {f"dense_{name}": value for name, value in asdict(level.dense).items()}
    return EngineLatency(**shared | asdict(level.plan) | dense)


_FIGURES = {each.name for each in fields(PlanFigures)} - {"secondary"}


def _shared(record: Verdict | LatencyComparison) -> dict[str, Any]:
    """Return the published figures that a record holds under their name."""
    return {each.name: getattr(record, each.name) for each in fields(record) if each.name in _FIGURES}
