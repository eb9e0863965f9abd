"""Find the plan to use: the fastest published one of a model on a task within limits."""

from __future__ import annotations

from dataclasses import replace

from optimizer.errors import NoFeasiblePlan, UsageFault
from optimizer.job.present import PresentVersions
from optimizer.job.result import losses, meets_constraint
from storage.database import Database
from storage.pareto import STANDALONE
from storage.records import plans
from storage.records.plans import LOSSLESS, Plan, PlanQuery


def find_best(
    db: Database,
    query: PlanQuery,
    *,
    all_versions: bool = False,
    max_collateral_drop: float | None = None,
    max_text_kl: float | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """Return the fastest plan within limits, and what changed since it was measured.

    A query that limits neither loss nor accuracy leaves out plans that miss their own job's constraint.
    Raises UsageFault when model or task is not named, NoFeasiblePlan when no plan meets the limits.
    """
    if query.model is None or query.task is None:
        raise UsageFault("name both --model and --task")
    present = PresentVersions(db)
    own_limits = query.max_accuracy_drop is None and query.min_accuracy is None

    def find(query: PlanQuery, *, missing: bool = False) -> Plan | None:
        beside = max_collateral_drop is not None or max_text_kl is not None
        if query.engine is None and not own_limits and not beside and query.min_accuracy is None:
            return plans.best(db, query)
        # Judgements and what is measured beside the task have no columns of their own.
        for plan in plans.list_plans(db, replace(query, limit=None)):
            considered = missing or not own_limits or meets_constraint(plan) is not False
            if (
                considered
                and _faster(plan, query)
                and _accurate(plan, query)
                and _within(plan, max_collateral_drop, max_text_kl)
            ):
                return plan
        return None

    asked = present.resolve(query, all_versions=all_versions)
    found = find(asked)
    if found is not None:
        return found, present.changes(found)
    kind = "" if query.mode == STANDALONE else f"{query.mode} "
    what = f"no published {kind}plan of {query.model} on {query.task}"
    if query.engine is not None:
        what += f" that {query.engine} served at a concurrency of {query.concurrency or 1}"
    if fastest := find(asked, missing=True):
        raise NoFeasiblePlan(
            f"{what} meets the constraint of its own job; the dense model is the answer. The fastest, plan "
            f"{fastest.id}, misses it; --max-accuracy-drop sets another limit"
        )
    if not all_versions and (former := find(present.named(query))):
        raise NoFeasiblePlan(
            f"{what} as they are now meets these limits; plan {former.id} was measured before "
            f"{', '.join(present.changes(former))} changed: run the job again, or take it with --all-versions"
        )
    raise NoFeasiblePlan(f"{what} meets these limits; the dense model is the answer")


def _faster(plan: Plan, query: PlanQuery) -> bool:
    """Tell whether the query's engine surely serves a plan faster than dense; the job judged one concurrency alone."""
    asked = query.engine, query.concurrency or 1
    served = [each for each in plan.engine_latencies if (each.engine, each.concurrency) == asked]
    return query.engine is None or served[-1].speedup_low > 1


def _accurate(plan: Plan, query: PlanQuery) -> bool:
    """Tell whether a plan of several tasks is as accurate as asked on each; its own figures are of one of them."""
    own = [each.accuracy for each in losses(plan) if each.weight]
    return query.min_accuracy is None or min(own, default=1.0) >= query.min_accuracy


def _within(plan: Plan, max_collateral_drop: float | None, max_text_kl: float | None) -> bool:
    """Tell whether a plan was measured beside its task, and keeps to the limits there; a lossless one loses nothing.

    What its job judged is held to the limits by the upper end of its interval, what it only measured as measured.
    """
    if plan.mode == LOSSLESS:
        return True
    beside = plan.secondary.get("collateral") or {}
    divergence = (beside.get("text") or {}).get("kl")
    drops = {name: task["dense_accuracy"] - task["accuracy"] for name, task in beside.get("tasks", {}).items()}
    for each in losses(plan):
        if each.is_text:
            divergence = each.loss_high
        elif not each.weight:
            drops[each.name] = each.loss_high
    keeps_tasks = max_collateral_drop is None or (drops and max(drops.values()) <= max_collateral_drop)
    keeps_text = max_text_kl is None or (divergence is not None and divergence <= max_text_kl)
    return bool(keeps_tasks and keeps_text)
