"""Reading for people: what reports and the dashboard show, without the bulk (per-sample scores) that they do not."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from storage.database import reads
from storage.records import scores
from storage.records.measurements import Redundancy
from storage.schema import (
    DeviceRow,
    EvaluationRow,
    JobRow,
    LatencyProfileRow,
    ModelNameRow,
    ModelRow,
    PlanRow,
    RedundancyRow,
    TaskRow,
)


@dataclass(frozen=True)
class EvaluationSummary:
    """An evaluation without its per-sample scores; ``seconds`` is 0 where it was taken over from another job."""

    id: int
    model_id: int
    task_id: int
    plan: str
    compensation: str
    settings: str
    split: str
    split_hash: str
    rung: int
    n: int
    accuracy: float | None
    seconds: float
    failure: str | None
    reused_from: int | None
    recorded_at: datetime
    layer_executions: int
    layer_executions_saved: int


@dataclass(frozen=True)
class JobProfile:
    """A job's latency profile with the device it was measured on; times in seconds, one entry a layer."""

    model_id: int
    task_id: int
    device: str
    workload: str
    prompt_tokens: int
    dense_seconds: float
    layer_seconds: dict[str, tuple[float, ...]]
    relative_error: float
    measured_at: datetime


@dataclass(frozen=True)
class KnownModel:
    """A model, the name it was last loaded under, and how many plans are published for it."""

    id: int
    name: str
    fingerprint: str
    family: str
    num_layers: int
    parameters: int
    plans: int


@dataclass(frozen=True)
class KnownTask:
    """One version of a task's data and splits, and how many plans are published for it."""

    id: int
    name: str
    data_hash: str
    split_seed: int
    calibration_size: int
    search_size: int
    held_out_size: int
    plans: int


_SUMMARY = (
    EvaluationRow.id,
    EvaluationRow.model_id,
    EvaluationRow.task_id,
    EvaluationRow.plan,
    EvaluationRow.compensation,
    EvaluationRow.settings,
    EvaluationRow.split,
    EvaluationRow.split_hash,
    EvaluationRow.rung,
    EvaluationRow.n,
    EvaluationRow.accuracy,
    EvaluationRow.seconds,
    EvaluationRow.failure,
    EvaluationRow.reused_from,
    EvaluationRow.recorded_at,
    EvaluationRow.layer_executions,
    EvaluationRow.layer_executions_saved,
)


@reads
def evaluations(session: Session, job_id: int) -> list[EvaluationSummary]:
    """All evaluations of a job, in the order in which they were recorded."""
    query = select(*_SUMMARY).where(EvaluationRow.job_id == job_id).order_by(EvaluationRow.id)
    return [EvaluationSummary(**row._mapping) for row in session.execute(query)]


@reads
def sample_scores(session: Session, evaluation_id: int) -> tuple[float, ...]:
    """The per-sample scores of one evaluation, in the split's order; empty when there is none of that id."""
    row = session.execute(
        select(EvaluationRow.scores, EvaluationRow.n).where(EvaluationRow.id == evaluation_id)
    ).one_or_none()
    return () if row is None else scores.unpack(row.scores, row.n)


@reads
def latency_profile(session: Session, job_id: int) -> JobProfile | None:
    """The latency profile that a job measured, or ``None``."""
    query = (
        select(LatencyProfileRow, DeviceRow.name)
        .join(DeviceRow, DeviceRow.id == LatencyProfileRow.device_id)
        .where(LatencyProfileRow.job_id == job_id)
        .order_by(LatencyProfileRow.id.desc())
        .limit(1)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        return None
    row, device = found
    return JobProfile(
        model_id=row.model_id,
        task_id=row.task_id,
        device=device,
        workload=row.workload,
        prompt_tokens=row.prompt_tokens,
        dense_seconds=row.dense_seconds,
        layer_seconds={letter: tuple(seconds) for letter, seconds in row.layer_seconds.items()},
        relative_error=row.relative_error,
        measured_at=row.measured_at,
    )


@reads
def redundancy(session: Session, job_id: int, model_id: int, task_id: int) -> list[Redundancy]:
    """The statistics that a job used, by name, token group and layer; bookkeeping rows are left out.

    Statistics are shared between jobs: where this one wrote none itself, the last ones measured of its model and task.
    """
    mine = (RedundancyRow.model_id == model_id, RedundancyRow.task_id == task_id)
    own_first = case((RedundancyRow.job_id == job_id, 0), else_=1)
    chosen = select(RedundancyRow.calibration_hash).where(*mine).order_by(own_first, RedundancyRow.id.desc()).limit(1)
    query = (
        select(RedundancyRow)
        .where(*mine, RedundancyRow.calibration_hash == chosen.scalar_subquery(), RedundancyRow.name != "measured")
        .order_by(RedundancyRow.name, RedundancyRow.token_group, RedundancyRow.layer)
    )
    return [
        Redundancy(row.layer, row.token_group, row.name, row.value, row.standard_error, row.n)
        for row in session.scalars(query)
    ]


@reads
def jobs_like(session: Session, job_id: int, model_id: int, task_id: int, limit: int = 12) -> list[int]:
    """Other jobs that evaluated plans of this model on this task and came to a result, newest first."""
    query = (
        select(JobRow.id)
        .where(
            JobRow.id != job_id,
            JobRow.state.in_(("succeeded", "infeasible")),
            select(EvaluationRow.id)
            .where(
                EvaluationRow.job_id == JobRow.id,
                EvaluationRow.model_id == model_id,
                EvaluationRow.task_id == task_id,
            )
            .exists(),
        )
        .order_by(JobRow.id.desc())
        .limit(limit)
    )
    return list(session.scalars(query))


@reads
def models(session: Session) -> list[KnownModel]:
    """Every model, the one last added first."""
    latest = (
        select(ModelNameRow.name)
        .where(ModelNameRow.model_id == ModelRow.id)
        .order_by(ModelNameRow.seen_at.desc(), ModelNameRow.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    published = select(func.count(PlanRow.id)).where(PlanRow.model_id == ModelRow.id).scalar_subquery()
    return [
        KnownModel(row.id, name or row.fingerprint, row.fingerprint, row.family, row.num_layers, row.parameters, plans)
        for row, name, plans in session.execute(select(ModelRow, latest, published).order_by(ModelRow.id.desc()))
    ]


@reads
def tasks(session: Session) -> list[KnownTask]:
    """Every version of every task, by name, the one last added first."""
    published = select(func.count(PlanRow.id)).where(PlanRow.task_id == TaskRow.id).scalar_subquery()
    return [
        KnownTask(
            id=row.id,
            name=row.name,
            data_hash=row.data_hash,
            split_seed=row.split_seed,
            calibration_size=row.calibration_size,
            search_size=row.search_size,
            held_out_size=row.held_out_size,
            plans=plans,
        )
        for row, plans in session.execute(select(TaskRow, published).order_by(TaskRow.name, TaskRow.id.desc()))
    ]


@reads
def devices(session: Session) -> list[str]:
    """The names of all devices that latency was measured on."""
    return list(session.scalars(select(DeviceRow.name).order_by(DeviceRow.name)))
