"""Read a job's result back from the database, so that the printed figures are the stored ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from storage.database import Database
from storage.queue import events, jobs, stages
from storage.queue.jobs import Job
from storage.records import plans
from storage.records.described import described
from storage.records.engine_latencies import EngineLatency
from storage.records.plans import LOSSLESS, MeasuredFigures, Plan
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
    warning: str = ""
    """What is wrong with the dense model, where the job went on all the same."""
    failed_samples: list[dict[str, str]] = field(default_factory=list)
    """Samples that failed and were left out: split, sample, reason."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "job": self.job.id,
            "state": self.job.state,
            "reason": self.job.error,
            "warning": self.warning,
            "failed_samples": self.failed_samples,
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
    warnings = [dense_warning(plan) for plan in published]
    if "dense" in recorded:
        warnings.append(recorded["dense"].payload["value"]["warning"])
    return JobResult(
        job=jobs.get(db, job_id),
        failed_samples=[event.data for event in events.for_job(db, job_id) if event.kind == "sample_failed"],
        warning=next(filter(None, warnings), ""),
        plans=tuple(published),
        best=next((plan for plan in published if plan.id == best_id), None),
        search={
            "plans_tried": max(0, len(outcome["trials"]) - 1),
            "plans_failed": len(outcome["failed"]),
            "stopped_because": outcome.get("stopped_because", ""),
        },
    )


@dataclass(frozen=True, kw_only=True)
class PlanAnswer(Plan):
    """A published plan as ``--json`` and the JSON API show it."""

    layers: dict[str, list[int]] = described("Layers that do other than run, by action")
    meets_constraint: bool | None = described("By the limits of its job; null where that is not known")
    changed: tuple[str, ...] | None = described(
        "What changed since it was measured: model files, data, or prompt, answer or metric; null where not compared"
    )

    @classmethod
    def of(cls, plan: Plan, changed: tuple[str, ...] | None = None) -> PlanAnswer:
        """Spell out a stored plan."""
        stored = {each.name: getattr(plan, each.name) for each in fields(Plan)}
        layers, meets = layers_by_action(plan.plan), meets_constraint(plan)
        return cls(**stored, layers=layers, meets_constraint=meets, changed=changed)


def plan_json(plan: Plan, changed: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return a published plan as plain JSON values."""
    return asdict(PlanAnswer.of(plan, changed)) | {"published_at": plan.published_at.isoformat()}


def meets_constraint(plan: Plan) -> bool | None:
    """Return the job's judgement of a published plan; None where it was imported without one."""
    judged = plan.secondary.get("meets_constraint")
    return judged if isinstance(judged, bool) else None


def judging(plan: Plan) -> EngineLatency | None:
    """Return the engine's latency that its job judged a plan by; None where ``generate`` judged it."""
    by = plan.secondary.get("judged_by") or {}
    asked = by.get("engine"), by.get("concurrency")
    return next((each for each in plan.engine_latencies if (each.engine, each.concurrency) == asked), None)


@dataclass(frozen=True)
class Loss:
    """Hold a plan's held-out loss on one of the tasks, or the text, that its job judges it by."""

    name: str
    n_samples: int
    accuracy: float
    """Of text, the share of next tokens that are predicted right."""
    accuracy_low: float
    accuracy_high: float
    dense_accuracy: float
    loss: float
    """Accuracy lost, as a share; of text KL(dense || plan), in nats a token."""
    loss_low: float
    loss_high: float
    """The upper end of the loss's interval is what its limit is judged on."""
    max_loss: float | None
    min_accuracy: float | None
    weight: float
    """In the mean loss; 0 for what is judged beside the job's tasks."""
    is_text: bool
    within: bool


_LOSSES = TypeAdapter(tuple[Loss, ...])


def losses(plan: MeasuredFigures) -> tuple[Loss, ...]:
    """Return a plan's losses where its job judged by several; empty where it judged by accuracy on its one task.

    An imported plan may hold anything there, which then counts as nothing.
    """
    try:
        return _LOSSES.validate_python(plan.secondary.get("goals") or ())
    except ValidationError:
        return ()


def worst_task(plan: MeasuredFigures) -> str:
    """Name the task that a plan's own accuracy and difference are of, where its job judged by several losses."""
    own = [each for each in losses(plan) if each.weight]
    return max(own, key=lambda each: each.loss_high).name if own else ""


def drafting_of(plan: Plan) -> dict[str, Any] | None:
    """Return what was measured of a lossless plan as a drafter; None where it is none."""
    found = plan.secondary.get("lossless")
    return found if plan.mode == LOSSLESS and isinstance(found, dict) else None


def dense_warning(plan: Plan) -> str:
    """Return what is wrong with the dense model that a plan is compared with; empty where nothing is known to be."""
    return str(plan.secondary.get("dense_warning", ""))


def judgement(plan: Plan, words: Mapping[bool | None, str]) -> str:
    """Word whether a plan meets its job's constraint, and whether that says anything."""
    useless = ", but see the warning on the dense model" if meets_constraint(plan) and dense_warning(plan) else ""
    return words[meets_constraint(plan)] + useless


def task_names(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """List the tasks of a stored job as its file names them, in order."""
    several = sorted(str(goal["task"]) for goal in spec.get("tasks") or ())
    return tuple(several) or (str(spec.get("task", "unknown task")),)


def tasks_of_job(spec: Mapping[str, Any]) -> str:
    """Name the task of a stored job, or its several tasks together, as ``--task`` takes them: ``"a+b"``."""
    return "+".join(task_names(spec))


def shown_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a stored specification what follows the hosts of its hooks: of some services that is the secret."""
    if not spec.get("notify"):
        return spec
    return spec | {"notify": [re.sub(r"(://[^/?#]*).*", r"\1/...", target) for target in spec["notify"]]}


def layers_by_action(text: str) -> dict[str, list[int]]:
    """Group the layers that do other than run by the action's name."""
    plan = SkipPlan.parse(text)
    actions = [action for action in Action if action is not Action.RUN and plan.layers(action)]
    return {action.label: list(plan.layers(action)) for action in actions}
