"""Read a job's result back from the database, so that the printed figures are the stored ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from storage.database import Database
from storage.queue import jobs, stages
from storage.queue.jobs import Job
from storage.records import plans
from storage.records.plans import Plan
from workers.runtime import Action, SkipPlan


@dataclass(frozen=True)
class JobResult:
    """A finished job with its published plans, the fastest first."""

    job: Job
    plans: tuple[Plan, ...]
    best: Plan | None
    """The plan that meets the job's constraint at the largest measured speed-up."""
    search: dict[str, Any]
    """Number of plans that the search tried, of failures among them, and why it stopped."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "job": self.job.id,
            "state": self.job.state,
            "reason": self.job.error,
            "search": self.search,
            "best": None if self.best is None else plan_json(self.best),
            "plans": [plan_json(plan) for plan in self.plans],
        }


def load_result(db: Database, job_id: int) -> JobResult:
    """Read a job's result. Raises NotFound."""
    recorded = stages.stages(db, job_id)
    published = plans.for_job(db, job_id)
    best_id = recorded["publish"].payload["value"]["best"] if "publish" in recorded else None
    outcome = recorded["search"].payload["value"] if "search" in recorded else {"trials": [], "failed": {}}
    return JobResult(
        job=jobs.get(db, job_id),
        plans=tuple(published),
        best=next((plan for plan in published if plan.id == best_id), None),
        search={
            "plans_tried": max(0, len(outcome["trials"]) - 1),
            "plans_failed": len(outcome["failed"]),
            "stopped_because": outcome.get("stopped_because", ""),
        },
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """Dump a published plan as plain JSON values, with its layers by action."""
    values = asdict(plan)
    values["published_at"] = plan.published_at.isoformat()
    values["layers"] = layers_by_action(plan.plan)
    return values


def layers_by_action(text: str) -> dict[str, list[int]]:
    """Group the layers that do other than run by the action's name."""
    plan = SkipPlan.parse(text)
    actions = [action for action in Action if action is not Action.RUN and plan.layers(action)]
    return {action.label: list(plan.layers(action)) for action in actions}
