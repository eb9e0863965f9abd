"""List what the database holds for people to look through: models, tasks, devices, jobs alike; and pandas frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage.database import reads
from storage.records import lookup
from storage.records.described import described
from storage.records.lookup import ModelRecord, TaskRecord
from storage.schema import DeviceRow, EvaluationRow, JobRow, ModelRow, PlanRow, TaskRow

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class KnownModel(ModelRecord):
    """A model that some job loaded."""

    id: int
    plans: int = described("How many plans are published for it")


@dataclass(frozen=True, kw_only=True)
class KnownTask(TaskRecord):
    """One version of a task's data and splits."""

    id: int
    plans: int = described("How many plans are published for it")


@reads
def jobs_like(session: Session, job_id: int, model_id: int, task_id: int, limit: int = 12) -> list[int]:
    """Find other jobs that evaluated plans of this model on this task and came to a result, newest first."""
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
    """List every model, the one last added first."""
    published = select(func.count(PlanRow.id)).where(PlanRow.model_id == ModelRow.id).scalar_subquery()
    query = select(ModelRow, lookup.latest_name(ModelRow.id), published).order_by(ModelRow.id.desc())
    return [
        KnownModel(id=row.id, plans=plans, **lookup.model_values(row, name))
        for row, name, plans in session.execute(query)
    ]


@reads
def tasks(session: Session) -> list[KnownTask]:
    """List every version of every task, by name, the one last added first."""
    published = select(func.count(PlanRow.id)).where(PlanRow.task_id == TaskRow.id).scalar_subquery()
    query = select(TaskRow, published).order_by(TaskRow.name, TaskRow.id.desc())
    return [KnownTask(id=row.id, plans=plans, **lookup.task_values(row)) for row, plans in session.execute(query)]


@reads
def devices(session: Session) -> list[str]:
    """List the names of all devices that latency was measured on."""
    return list(session.scalars(select(DeviceRow.name).order_by(DeviceRow.name)))


def frame(records: Iterable[Any], kind: type[Any]) -> pd.DataFrame:
    """Turn records of ``kind`` (plans, evaluations, redundancy) into a pandas frame, one column a field."""
    import pandas as pd

    # The columns are named even where there is no row, so that code which reads them need not look.
    return pd.DataFrame([asdict(each) for each in records], columns=[each.name for each in fields(kind)])
