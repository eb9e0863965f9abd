"""Stage 8: publish what was verified and measured, and choose the plan that answers the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from optimizer.job.sections import ConstraintSpec
from optimizer.search.space import Candidate, touched
from optimizer.stages import dense
from optimizer.stages.collateral import Collateral
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.verify import Finalist
from optimizer.verification.verdict import Verdict
from storage.pareto import Group
from storage.records import lookup, plans
from storage.records.plans import PlanFigures
from workers.messages import LatencyComparison
from workers.runtime import SkipPlan

Measured = dict[Candidate, LatencyComparison]
Beside = dict[Candidate, Collateral]


@dataclass(frozen=True)
class Published:
    """The ids of a job's published plans, and the one that meets the constraint at the largest measured speed-up."""

    plan_ids: tuple[int, ...]
    best: int | None
    reason: str
    """Why no plan is the answer; empty when one is."""


def run(context: JobContext, finalists: tuple[Finalist, ...], measured: Measured, beside: Beside) -> Published:
    """Publish every verified and measured plan, whether it meets the job's constraint or not."""
    context.progress.begin("publish", 1)
    published = context.load_or_compute("publish", Published, lambda: _publish(context, finalists, measured, beside))
    context.progress.advance()
    return published


def none(context: JobContext, reason: str) -> Published:
    """Record that no plan is the answer, where that is known before any is verified."""
    return context.load_or_compute("publish", Published, lambda: Published((), None, reason))


def _publish(context: JobContext, finalists: tuple[Finalist, ...], measured: Measured, beside: Beside) -> Published:
    constraint = context.spec.constraint
    complete = [(each, measured[each.candidate]) for each in finalists if each.candidate in measured]
    if not complete:
        raise JobFailed(f"none of the {len(finalists)} verified plans could be timed")
    verdict = complete[0][0].verdict
    warning = dense.warning_of(context, verdict.dense_accuracy, verdict.n_samples)
    rows: dict[Candidate, plans.Plan] = {}
    for device in dict.fromkeys(latency.device for _, latency in complete):  # a job may go on on another one
        timed = [each for each in complete if each[1].device == device]
        published = plans.publish(
            context.db,
            context.job,
            Group(context.model_id, context.task_id, lookup.ensure_device(context.db, device), context.workload_name),
            figures=[
                figures(finalist, latency, constraint, beside.get(finalist.candidate), warning)
                for finalist, latency in timed
            ],
        )
        rows |= {finalist.candidate: row for (finalist, _), row in zip(timed, published, strict=True)}
    feasible = [
        rows[finalist.candidate]
        for finalist, latency in complete
        if finalist.verdict.accepted and fast_enough(latency, constraint)
    ]
    best = max(feasible, key=lambda row: (row.speedup, row.accuracy), default=None)
    plan_ids = tuple(rows[finalist.candidate].id for finalist, _ in complete)
    if best is not None:
        return Published(plan_ids, best.id, "")
    return Published(plan_ids, None, _why_none([(each.verdict, latency) for each, latency in complete], constraint))


def _why_none(complete: Sequence[tuple[Verdict, LatencyComparison]], constraint: ConstraintSpec) -> str:
    """Explain why no plan is the answer, and how near the nearest came."""
    accurate = sum(verdict.accepted for verdict, _ in complete)
    fast = sum(fast_enough(latency, constraint) for _, latency in complete)
    reason = (
        f"no plan meets the constraint: of {len(complete)} verified on {complete[0][0].n_samples} held-out samples, "
        f"{accurate} surely keep the accuracy and {fast} are surely fast enough"
    )
    if not accurate:
        nearest = max((verdict for verdict, _ in complete), key=lambda verdict: verdict.difference_low)
        difference, low = round(100 * nearest.difference, 2) + 0.0, 100 * nearest.difference_low
        return f"{reason}; the nearest, {nearest.plan}, is at {difference:+.2f} points to dense, {low:+.2f} at worst"
    if not fast:
        quickest, latency = max(complete, key=lambda each: each[1].speedup_low)
        return f"{reason}; the fastest, {quickest.plan}, is {latency.speedup_low:.2f} times as fast at worst"
    return f"{reason}, none is both"


def fast_enough(latency: LatencyComparison, constraint: ConstraintSpec) -> bool:
    """Tell whether measured latency and cache are within the constraint; a plan must at least surely beat dense.

    The speed-up is judged by the lower end of its interval, milliseconds by the median request.
    """
    if constraint.max_latency_ms is not None and 1000 * latency.latency_seconds > constraint.max_latency_ms:
        return False
    if constraint.max_kv_cache_bytes is not None and latency.kv_cache_bytes > constraint.max_kv_cache_bytes:
        return False
    return latency.speedup_low >= constraint.min_speedup if constraint.min_speedup else latency.speedup_low > 1.0


def figures(
    finalist: Finalist,
    latency: LatencyComparison,
    constraint: ConstraintSpec,
    beside: Collateral | None = None,
    warning: str = "",
) -> PlanFigures:
    """Put the published figures of a plan together. Differences are accuracies less dense's, so a loss is negative."""
    verdict, kept = finalist.verdict, finalist.maps
    fitted = None if kept is None else {"gaps": [asdict(gap) for gap in kept.gaps], "tokens": kept.tokens}
    return PlanFigures(
        **_shared(verdict) | _shared(latency),
        artifact=None if kept is None else kept.artifact.location,
        artifact_checksum=None if kept is None else kept.artifact.checksum,
        layers_touched=touched(SkipPlan.parse(verdict.plan)),
        secondary={
            "metrics": verdict.secondary,
            "images": verdict.images,
            "difference_confidence": verdict.difference_confidence,
            "mcnemar_p": verdict.mcnemar_p,
            "meets_constraint": verdict.accepted and fast_enough(latency, constraint),
            "latency_pairs": latency.pairs,
            "peak_bytes": {"dense": latency.dense_peak_bytes, "plan": latency.peak_bytes},
            **({} if fitted is None else {"compensation": fitted}),
            **({} if beside is None else {"collateral": asdict(beside)}),
            **({"dense_warning": warning} if warning else {}),
        },
    )


_FIGURES = {each.name for each in fields(PlanFigures)} - {"secondary"}


def _shared(record: Verdict | LatencyComparison) -> dict[str, Any]:
    """Return the published figures that a record holds under their name."""
    return {each.name: getattr(record, each.name) for each in fields(record) if each.name in _FIGURES}
