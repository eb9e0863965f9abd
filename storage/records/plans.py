"""Published plans: what was proven about them, and finding the one to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, UnaryExpression, false, func, select, true, union_all
from sqlalchemy.orm import Session

from storage import pareto, upsert
from storage.database import reads, writes
from storage.errors import InvalidValue, NotFound
from storage.pareto import Group
from storage.queue import leases
from storage.queue.jobs import Job
from storage.records import engine_latencies, lookup
from storage.records.described import check_ranges, described
from storage.records.engine_latencies import EngineLatency
from storage.schema import DeviceRow, EngineLatencyRow, ModelRow, PlanRow, TaskRow

Sort = Literal["speedup", "accuracy", "latency_seconds", "difference", "newest"]
LOSSLESS = "lossless"
"""Mode of plans that draft for the dense model."""
_BRANCHES = 64
"""Up to this many pairs of model and task are read each from its own index range, and the results merged."""


@dataclass(frozen=True, kw_only=True)
class MeasuredFigures:
    """Figures verified on the held-out split and measured on the device; accuracies are shares, times seconds."""

    n_samples: int = described("Held-out samples", ge=1)
    accuracy: float = described(ge=0, le=1)
    accuracy_low: float = described(ge=0, le=1)
    accuracy_high: float = described(ge=0, le=1)
    dense_accuracy: float = described(ge=0, le=1)
    difference: float = described("Accuracy less dense accuracy on the same samples; a loss is negative")
    difference_low: float
    difference_high: float
    confidence: float = described(
        "Of the intervals; the difference's own is in secondary.difference_confidence where it was corrected for the "
        "number of plans compared",
        gt=0,
        lt=1,
    )
    latency_seconds: float = described("Of one request of the workload", gt=0)
    dense_latency_seconds: float = described(gt=0)
    speedup: float = described("Dense latency / latency, measured in pairs", gt=0)
    speedup_low: float
    speedup_high: float
    kv_cache_bytes: int = described(ge=0)
    dense_kv_cache_bytes: int = described(ge=0)
    extra_bytes: int | None = described(
        "Memory beside the dense model and its cache, for a lossless plan: the drafter's cache and folded weights",
        ge=0,
        default=None,
    )
    secondary: dict[str, Any] = field(default_factory=dict)
    engine_latencies: tuple[EngineLatency, ...] = described(
        "By engine, concurrency and version; empty where no engine served the plan", default=()
    )

    def check(self, subject: str) -> None:
        """Refuse figures that cannot be true. Raises ``InvalidValue`` naming ``subject`` and the field."""
        check_ranges(self, subject)
        for name in ("accuracy", "difference", "speedup"):
            if getattr(self, f"{name}_low") > getattr(self, f"{name}_high"):
                raise InvalidValue(f"{subject}: {name}_low is above {name}_high")
        for latency in self.engine_latencies:
            latency.check(subject)


@dataclass(frozen=True, kw_only=True)
class PlanFigures(MeasuredFigures):
    """A plan with its figures, as it is published."""

    plan: str = described("One letter a decoder layer, for example RRFBS")
    compensation: str = "none"
    layers_touched: int = described("Layers that do other than run", ge=0)
    artifact: str | None = described("Where the fitted maps of its compensation lie", default=None)
    artifact_checksum: str | None = described("SHA-256 of that file", default=None)


@dataclass(frozen=True, kw_only=True)
class Plan(PlanFigures):
    """A published plan with where it comes from and what it was measured for."""

    id: int
    job_id: int | None = described("None for plans that were imported")
    model_id: int
    model: str = described("The name under which the model was last loaded")
    fingerprint: str = described("SHA-256 of whatever in the model's files changes an answer")
    task_id: int
    task: str
    device: str
    workload: str
    mode: str = described("standalone, or lossless: the plan drafts and the dense model verifies")
    origin: str = described("measured here, or imported")
    on_front: bool = described("Whether no plan of its group is better in accuracy and speed")
    published_at: datetime


@dataclass(frozen=True)
class PlanQuery:
    """Which plans are asked for, and in what order.

    ``max_accuracy_drop`` (0.01 is one point) is held against the upper bound of the loss, not its estimate.
    With an ``engine``, speed-up and latency are that engine's at ``concurrency`` (1 where it is ``None``), and only
    plans that it served are meant. ``on_front`` leaves only members of a Pareto front. ``model_ids`` and ``task_ids``
    say which versions are meant, and then stand in the place of ``model`` and ``task``. ``mode`` is ``standalone`` or
    ``lossless``.
    """

    model: str | None = None
    task: str | None = None
    revision: str | None = None
    device: str | None = None
    workload: str | None = None
    engine: str | None = None
    concurrency: int | None = None
    max_accuracy_drop: float | None = None
    min_accuracy: float | None = None
    min_speedup: float | None = None
    max_latency_seconds: float | None = None
    on_front: bool = False
    sort: Sort = "speedup"
    limit: int | None = 50
    model_ids: tuple[int, ...] | None = None
    task_ids: tuple[int, ...] | None = None
    mode: str = pareto.STANDALONE


def mode_of(*, lossless: bool) -> str:
    """Name the mode of the plans that are asked for."""
    return LOSSLESS if lossless else pareto.STANDALONE


_JOINED = ("model", "fingerprint", "task", "device", "engine_latencies")
_COLUMNS = tuple(each.name for each in fields(Plan) if each.name not in _JOINED)

_GROUP_KEY = (
    PlanRow.model_id,
    PlanRow.task_id,
    PlanRow.device_id,
    PlanRow.workload,
    PlanRow.mode,
    PlanRow.plan,
    PlanRow.compensation,
)
_JOB_KEY = (PlanRow.job_id, *(column for column in _GROUP_KEY if column is not PlanRow.mode))  # a job has one mode


@writes
def publish(session: Session, job: Job, group: Group, figures: Sequence[PlanFigures]) -> list[Plan]:
    """Publish plans, all or none, and bring the fronts of their group up to date.

    Published again by the same job, a plan takes the new figures. Raises ``LeaseLost`` or ``InvalidValue``.
    """
    leases.hold(session, job)
    return _write(session, group, figures, job.id, "measured")


@writes
def import_plans(session: Session, group: Group, figures: Sequence[PlanFigures]) -> list[Plan]:
    """Take plans over from another database, marked as imported. Raises ``InvalidValue``."""
    return _write(session, group, figures, None, "imported")


def _write(
    session: Session, group: Group, figures: Sequence[PlanFigures], job_id: int | None, origin: str
) -> list[Plan]:
    for each in figures:
        each.check(f"plan {each.plan}")
    pareto.lock(session, [group])
    same = {"job_id": job_id, "origin": origin, "on_front": False, "contender": False} | asdict(group)
    served = {(each.plan, each.compensation): each.engine_latencies for each in figures}
    rows = [same | asdict(replace(each, engine_latencies=())) for each in figures]
    for row in rows:
        del row["engine_latencies"]
    if job_id is None:  # NULLs are not equal to each other, so imported plans have a unique index of their own
        upsert.insert_or_replace(session, PlanRow, rows, _GROUP_KEY, key_where=PlanRow.job_id.is_(None))
    else:
        upsert.insert_or_replace(session, PlanRow, rows, _JOB_KEY)
    pareto.recompute(session, group)
    written = (
        select(PlanRow.plan, PlanRow.compensation, PlanRow.id)
        .filter_by(**asdict(group), job_id=job_id)
        .where(PlanRow.plan.in_([each.plan for each in figures]))
    )
    ids = {(plan, compensation): plan_id for plan, compensation, plan_id in session.execute(written)}
    engine_latencies.write(session, {ids[candidate]: measured for candidate, measured in served.items()})
    return _load(session, [ids[candidate] for candidate in served])


@reads
def get(session: Session, plan_id: int) -> Plan:
    """Read one published plan. Raises ``NotFound``."""
    found = _load(session, [plan_id])
    if not found:
        raise NotFound(f"there is no plan {plan_id}")
    return found[0]


@reads
def for_job(session: Session, job_id: int) -> list[Plan]:
    """Read the plans that a job published, fastest first."""
    query = select(PlanRow.id).where(PlanRow.job_id == job_id).order_by(PlanRow.speedup.desc(), PlanRow.id)
    return _load(session, list(session.scalars(query)))


@reads
def best(session: Session, query: PlanQuery) -> Plan | None:
    """Find the published plan to use, or ``None`` when none meets the constraints.

    By default the fastest one; ``sort`` may put accuracy or latency first. Raises ``InvalidValue`` unless model and
    task are named, ``NotFound`` for a model, task or device that the database does not know.
    """
    if query.model is None or query.task is None:
        raise InvalidValue("the best plan is that of a model and a task; name both")
    if query.sort not in ("speedup", "accuracy", "latency_seconds"):
        raise InvalidValue(f"best cannot be sorted by {query.sort!r}; choose speedup, accuracy or latency_seconds")
    _check_engine(session, query)
    contenders = (
        select(PlanRow.id)
        .where(
            PlanRow.model_id.in_(_models(session, query) or ()),
            PlanRow.task_id.in_(_tasks(session, query) or ()),
            # Contenders are those by the figures of generate; an engine's may be others.
            *([] if query.engine else [PlanRow.contender == true()]),
            *_where(session, query),
        )
        .order_by(*_order(query))
        .limit(1)
    )
    found = _load(session, list(session.scalars(contenders)))
    return found[0] if found else None


@reads
def list_plans(session: Session, query: PlanQuery = PlanQuery()) -> list[Plan]:
    """List published plans, best first by ``query.sort``. Raises ``NotFound`` as ``best`` does."""
    conditions = _where(session, query)
    if query.on_front:
        conditions.append(PlanRow.on_front == true())
    order = _order(query)
    _check_engine(session, query)
    ids = _branched(session, _models(session, query), _tasks(session, query), conditions, order, query.limit)
    return _load(session, list(session.scalars(ids)))


def _check_engine(session: Session, query: PlanQuery) -> None:
    """Refuse an engine or a concurrency that nothing was measured with, before it reads as "no plan"."""
    if query.engine is None:
        if query.concurrency is not None:
            raise InvalidValue("concurrency is that of an engine; name the engine too")
        return
    known = engine_latencies.known(session)
    if (query.engine, query.concurrency or 1) not in known:
        there = ", ".join(f"{engine} at {concurrency}" for engine, concurrency in known) or "none"
        raise NotFound(
            f"no plan was served by {query.engine} with a concurrency of {query.concurrency or 1}; measured: {there}"
        )


def _models(session: Session, query: PlanQuery) -> list[int] | None:
    if query.model_ids is not None:
        return list(query.model_ids)
    return None if query.model is None else [lookup.find_model(session, query.model, query.revision)]


def _tasks(session: Session, query: PlanQuery) -> list[int] | None:
    if query.task_ids is not None:
        return list(query.task_ids)
    return None if query.task is None else lookup.find_tasks(session, query.task)


@reads
def last_job(session: Session, *, model_ids: Sequence[int] = (), task_ids: Sequence[int] = ()) -> int | None:
    """Return the last job that published a plan of one of these models, or on one of these tasks."""
    of = PlanRow.model_id.in_(model_ids) if model_ids else PlanRow.task_id.in_(task_ids)
    return session.scalar(select(func.max(PlanRow.job_id)).where(of))


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
    models = model_ids if model_ids is not None else list(session.scalars(select(ModelRow.id).limit(_BRANCHES + 1)))
    tasks = task_ids if task_ids is not None else list(session.scalars(select(TaskRow.id).limit(_BRANCHES + 1)))
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


def _where(session: Session, query: PlanQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [PlanRow.mode == query.mode]
    if query.device is not None:
        conditions.append(PlanRow.device_id.in_(lookup.find_devices(session, query.device)))
    if query.workload is not None:
        conditions.append(PlanRow.workload == query.workload)
    if query.max_accuracy_drop is not None:
        conditions.append(PlanRow.difference_low >= -query.max_accuracy_drop)
    if query.min_accuracy is not None:
        conditions.append(PlanRow.accuracy >= query.min_accuracy)
    speedup, latency = _timed(query)
    if query.engine is not None:
        conditions.append(speedup.is_not(None))
    if query.min_speedup is not None:
        conditions.append(speedup >= query.min_speedup)
    if query.max_latency_seconds is not None:
        conditions.append(latency <= query.max_latency_seconds)
    return conditions


def _timed(query: PlanQuery) -> tuple[ColumnElement[float], ColumnElement[float]]:
    """Return speed-up and latency that the query means: as measured by generate, or in its engine."""
    if query.engine is None:
        return PlanRow.speedup.expression, PlanRow.latency_seconds.expression
    names = (EngineLatencyRow.speedup, EngineLatencyRow.latency_seconds)
    speedup, latency = (engine_latencies.figure(name, query.engine, query.concurrency or 1) for name in names)
    return speedup, latency


def _order(query: PlanQuery) -> list[UnaryExpression[Any]]:
    """Sorting terms; the ones after the first settle ties, always in favour of the better plan, then the older."""
    sort, (speedup, seconds) = query.sort, _timed(query)
    speed, accuracy = speedup.desc(), PlanRow.accuracy.desc()
    sure, latency, oldest = PlanRow.difference_low.desc(), seconds.asc(), PlanRow.id.asc()
    orders: dict[str, list[UnaryExpression[Any]]] = {
        "speedup": [speed, accuracy, sure, latency, oldest],
        "accuracy": [accuracy, sure, speed, latency, oldest],
        "latency_seconds": [latency, speed, accuracy, sure, oldest],
        "difference": [sure, speed, accuracy, latency, oldest],
        "newest": [PlanRow.id.desc()],
    }
    if sort not in orders:
        raise InvalidValue(f"plans cannot be sorted by {sort!r}; choose one of {', '.join(orders)}")
    return orders[sort]


def _load(session: Session, ids: Sequence[int]) -> list[Plan]:
    """Whole plans, in the order of ``ids``."""
    if not ids:
        return []
    found: dict[int, Plan] = {}
    for start in range(0, len(ids), 500):  # databases limit the number of parameters
        served = engine_latencies.of_plans(session, ids[start : start + 500])
        query = (
            select(PlanRow, lookup.latest_name(PlanRow.model_id), ModelRow.fingerprint, TaskRow.name, DeviceRow.name)
            .join(ModelRow, ModelRow.id == PlanRow.model_id)
            .join(TaskRow, TaskRow.id == PlanRow.task_id)
            .join(DeviceRow, DeviceRow.id == PlanRow.device_id)
            .where(PlanRow.id.in_(ids[start : start + 500]))
            .execution_options(populate_existing=True)
        )
        for row, model, fingerprint, task, device in session.execute(query):
            joined: dict[str, Any] = {
                "model": model or fingerprint,
                "fingerprint": fingerprint,
                "task": task,
                "device": device,
                "engine_latencies": served.get(row.id, ()),
            }
            found[row.id] = Plan(**joined, **{name: getattr(row, name) for name in _COLUMNS})
    return [found[each] for each in ids if each in found]
