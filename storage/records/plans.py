"""Published plans: what was proven about them, and finding the one to use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, UnaryExpression, false, select, true, union_all
from sqlalchemy.orm import Session

from storage import pareto, upsert
from storage.database import reads, writes
from storage.errors import InvalidValue, NotFound
from storage.pareto import Group
from storage.queue import jobs
from storage.queue.jobs import Job
from storage.records import names
from storage.schema import DeviceRow, ModelNameRow, ModelRow, PlanRow, TaskRow

Sort = Literal["speedup", "accuracy", "seconds", "drop", "newest"]
_BRANCHES = 64
"""Up to this many pairs of model and task are read each from its own index range, and the results merged."""


@dataclass(frozen=True, kw_only=True)
class PlanFigures:
    """What was measured about a plan: accuracies in [0, 1] on the held-out split, times in seconds.

    ``difference`` is the plan's accuracy less the dense model's on the same samples; a loss is negative. The
    intervals have the given ``confidence``. ``speedup`` is dense seconds / plan seconds, measured in pairs.
    """

    plan: str
    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    dense_accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    confidence: float
    dense_seconds: float
    seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    dense_kv_cache_bytes: int
    kv_cache_bytes: int
    layers_touched: int
    compensation: str = "none"
    artefact: str | None = None
    """Where the fitted compensation lies, and the checksum of that file."""
    artefact_checksum: str | None = None
    secondary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan(PlanFigures):
    """A published plan with where it comes from and what it was measured for."""

    id: int
    job_id: int | None
    model_id: int
    model: str
    """The name under which the model was last loaded."""
    fingerprint: str
    task_id: int
    task: str
    device: str
    workload: str
    origin: str
    """``"measured"`` here, or ``"imported"``."""
    on_front: bool
    published_at: datetime


_FIGURES = tuple(each.name for each in fields(PlanFigures))

_GROUP_KEY = (
    PlanRow.model_id,
    PlanRow.task_id,
    PlanRow.device_id,
    PlanRow.workload,
    PlanRow.plan,
    PlanRow.compensation,
)


@writes
def publish(
    session: Session,
    job: Job,
    *,
    model_id: int,
    task_id: int,
    device_id: int,
    workload: str,
    figures: Sequence[PlanFigures],
) -> list[Plan]:
    """Publish plans, all or none, and bring the fronts of their group up to date.

    Published again by the same job, a plan takes the new figures. Raises ``LeaseLost`` or ``InvalidValue``.
    """
    jobs.hold(session, job)
    group = Group(model_id, task_id, device_id, workload)
    return _write(session, group, figures, {"job_id": job.id, "origin": "measured"})


@writes
def import_plans(
    session: Session, *, model_id: int, task_id: int, device_id: int, workload: str, figures: Sequence[PlanFigures]
) -> list[Plan]:
    """Take plans over from another database, marked as imported. Raises ``InvalidValue``."""
    group = Group(model_id, task_id, device_id, workload)
    return _write(session, group, figures, {"job_id": None, "origin": "imported"})


def _write(
    session: Session,
    group: Group,
    figures: Sequence[PlanFigures],
    source: dict[str, Any],
) -> list[Plan]:
    for each in figures:
        _validate(each)
    pareto.lock(session, [group])
    same = source | asdict(group) | {"on_front": False, "contender": False}
    rows = [same | asdict(each) for each in figures]
    if (
        source["job_id"] is None
    ):  # NULLs are not equal to each other, so imported plans have a unique index of their own
        upsert.insert_or_replace(session, PlanRow, rows, _GROUP_KEY, key_where=PlanRow.job_id.is_(None))
    else:
        upsert.insert_or_replace(session, PlanRow, rows, [PlanRow.job_id, *_GROUP_KEY])
    pareto.recompute(session, group)
    written = select(PlanRow.id).where(
        PlanRow.job_id == source["job_id"] if source["job_id"] is not None else PlanRow.job_id.is_(None),
        PlanRow.model_id == group.model_id,
        PlanRow.task_id == group.task_id,
        PlanRow.device_id == group.device_id,
        PlanRow.workload == group.workload,
        PlanRow.plan.in_([each.plan for each in figures]),
    )
    ids = {(each.plan, each.compensation): each for each in _load(session, list(session.scalars(written)))}
    return [ids[each.plan, each.compensation] for each in figures]


def _validate(figures: PlanFigures) -> None:
    """Refuse figures that cannot be true; the message names the plan and the field."""
    for name in _FIGURES:
        value = getattr(figures, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidValue(f"plan {figures.plan}: {name} is {value}")
    for name in ("accuracy", "accuracy_low", "accuracy_high", "dense_accuracy"):
        if not 0.0 <= getattr(figures, name) <= 1.0:
            raise InvalidValue(f"plan {figures.plan}: {name} is {getattr(figures, name)}, outside [0, 1]")
    if not 0.0 < figures.confidence < 1.0:
        raise InvalidValue(f"plan {figures.plan}: confidence is {figures.confidence}, outside (0, 1)")
    for name in ("speedup", "seconds", "dense_seconds", "n"):
        if getattr(figures, name) <= 0:
            raise InvalidValue(f"plan {figures.plan}: {name} is {getattr(figures, name)}, must be above 0")
    for name in ("accuracy", "difference", "speedup"):
        if getattr(figures, f"{name}_low") > getattr(figures, f"{name}_high"):
            raise InvalidValue(f"plan {figures.plan}: {name}_low is above {name}_high")


@reads
def get(session: Session, plan_id: int) -> Plan:
    """One published plan. Raises ``NotFound``."""
    found = _load(session, [plan_id])
    if not found:
        raise NotFound(f"there is no plan {plan_id}")
    return found[0]


@reads
def for_job(session: Session, job_id: int) -> list[Plan]:
    """The plans that a job published, fastest first."""
    query = select(PlanRow.id).where(PlanRow.job_id == job_id).order_by(PlanRow.speedup.desc(), PlanRow.id)
    return _load(session, list(session.scalars(query)))


@reads
def best(
    session: Session,
    model: str,
    task: str,
    *,
    device: str | None = None,
    workload: str | None = None,
    revision: str | None = None,
    max_accuracy_drop: float | None = None,
    min_accuracy: float | None = None,
    min_speedup: float | None = None,
    max_latency: float | None = None,
    sort: Sort = "speedup",
) -> Plan | None:
    """The published plan to use, or ``None`` when none meets the constraints.

    ``max_accuracy_drop`` (0.01 is one point) is held against the upper bound of the loss, not its estimate;
    ``max_latency`` is in seconds. By default the fastest plan that meets the constraints; ``sort`` may put accuracy
    or seconds first. Raises ``NotFound`` for a model, task or device that the database does not know.
    """
    if sort not in ("speedup", "accuracy", "seconds"):
        raise InvalidValue(f"best cannot be sorted by {sort!r}; choose speedup, accuracy or seconds")
    query = (
        select(PlanRow.id)
        .where(
            PlanRow.model_id == names.find_model(session, model, revision),
            PlanRow.task_id.in_(names.find_tasks(session, task)),
            PlanRow.contender == true(),
            *_where(session, device, workload, max_accuracy_drop, min_accuracy, min_speedup, max_latency),
        )
        .order_by(*_order(sort))
        .limit(1)
    )
    found = _load(session, list(session.scalars(query)))
    return found[0] if found else None


@reads
def list_plans(
    session: Session,
    model: str | None = None,
    task: str | None = None,
    *,
    device: str | None = None,
    workload: str | None = None,
    revision: str | None = None,
    max_accuracy_drop: float | None = None,
    min_accuracy: float | None = None,
    min_speedup: float | None = None,
    max_latency: float | None = None,
    on_front: bool = False,
    sort: Sort = "speedup",
    limit: int | None = 50,
) -> list[Plan]:
    """Published plans, best first by ``sort``; constraints as for ``best``. ``on_front`` leaves only Pareto members."""
    conditions = _where(session, device, workload, max_accuracy_drop, min_accuracy, min_speedup, max_latency)
    if on_front:
        conditions.append(PlanRow.on_front == true())
    order = _order(sort)
    model_ids = None if model is None else [names.find_model(session, model, revision)]
    task_ids = None if task is None else names.find_tasks(session, task)
    query = _branched(session, model_ids, task_ids, conditions, order, limit)
    return _load(session, list(session.scalars(query)))


def _branched(
    session: Session,
    model_ids: list[int] | None,
    task_ids: list[int] | None,
    conditions: list[ColumnElement[bool]],
    order: list[UnaryExpression[Any]],
    limit: int | None,
) -> Select[int]:
    """Ids in order. Each model and task is read in its index's order up to the limit, then the parts are merged."""
    everything = select(PlanRow.id).order_by(*order).limit(limit)
    if model_ids is None and task_ids is None:
        return everything.where(*conditions)
    models = model_ids or list(session.scalars(select(ModelRow.id).limit(_BRANCHES + 1)))
    tasks = task_ids or list(session.scalars(select(TaskRow.id).limit(_BRANCHES + 1)))
    if limit is None or len(models) * len(tasks) > _BRANCHES:
        if model_ids is not None:
            conditions = [*conditions, PlanRow.model_id.in_(model_ids)]
        if task_ids is not None:
            conditions = [*conditions, PlanRow.task_id.in_(task_ids)]
        return everything.where(*conditions)
    parts = [
        everything.where(PlanRow.model_id == model, PlanRow.task_id == task, *conditions)
        for model in models
        for task in tasks
    ]
    if not parts:
        return everything.where(false())
    if len(parts) == 1:
        return parts[0]
    return everything.where(PlanRow.id.in_(union_all(*(select(part.subquery().c.id) for part in parts))))


def _where(
    session: Session,
    device: str | None,
    workload: str | None,
    max_accuracy_drop: float | None,
    min_accuracy: float | None,
    min_speedup: float | None,
    max_latency: float | None,
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if device is not None:
        conditions.append(PlanRow.device_id.in_(names.find_devices(session, device)))
    if workload is not None:
        conditions.append(PlanRow.workload == workload)
    if max_accuracy_drop is not None:
        conditions.append(PlanRow.difference_low >= -max_accuracy_drop)
    if min_accuracy is not None:
        conditions.append(PlanRow.accuracy >= min_accuracy)
    if min_speedup is not None:
        conditions.append(PlanRow.speedup >= min_speedup)
    if max_latency is not None:
        conditions.append(PlanRow.seconds <= max_latency)
    return conditions


def _order(sort: Sort) -> list[UnaryExpression[Any]]:
    """Sorting terms; the ones after the first settle ties, always in favour of the better plan, then the older."""
    speed, accuracy = PlanRow.speedup.desc(), PlanRow.accuracy.desc()
    sure, seconds, oldest = PlanRow.difference_low.desc(), PlanRow.seconds.asc(), PlanRow.id.asc()
    orders: dict[str, list[UnaryExpression[Any]]] = {
        "speedup": [speed, accuracy, sure, seconds, oldest],
        "accuracy": [accuracy, sure, speed, seconds, oldest],
        "seconds": [seconds, speed, accuracy, sure, oldest],
        "drop": [sure, speed, accuracy, seconds, oldest],
        "newest": [PlanRow.id.desc()],
    }
    if sort not in orders:
        raise InvalidValue(f"plans cannot be sorted by {sort!r}; choose one of {', '.join(orders)}")
    return orders[sort]


def _load(session: Session, ids: Sequence[int]) -> list[Plan]:
    """Whole plans, in the order of ``ids``."""
    if not ids:
        return []
    latest_name = (
        select(ModelNameRow.name)
        .where(ModelNameRow.model_id == PlanRow.model_id)
        .order_by(ModelNameRow.seen_at.desc(), ModelNameRow.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    found: dict[int, Plan] = {}
    for start in range(0, len(ids), 500):  # engines limit the number of parameters
        query = (
            select(PlanRow, latest_name, ModelRow.fingerprint, TaskRow.name, DeviceRow.name)
            .join(ModelRow, ModelRow.id == PlanRow.model_id)
            .join(TaskRow, TaskRow.id == PlanRow.task_id)
            .join(DeviceRow, DeviceRow.id == PlanRow.device_id)
            .where(PlanRow.id.in_(ids[start : start + 500]))
            .execution_options(populate_existing=True)
        )
        for row, model, fingerprint, task, device in session.execute(query):
            found[row.id] = Plan(
                **{name: getattr(row, name) for name in _FIGURES},
                id=row.id,
                job_id=row.job_id,
                model_id=row.model_id,
                model=model or fingerprint,
                fingerprint=fingerprint,
                task_id=row.task_id,
                task=task,
                device=device,
                workload=row.workload,
                origin=row.origin,
                on_front=row.on_front,
                published_at=row.published_at,
            )
    return [found[each] for each in ids if each in found]
