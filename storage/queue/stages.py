"""Keep the results of a job's finished stages, and its counters: all that another process needs to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import upsert
from storage.database import reads, writes
from storage.queue import events, leases
from storage.queue.jobs import Job
from storage.schema import JobCounterRow, JobStageRow


@dataclass(frozen=True)
class Stage:
    """The result of a stage of a job, and the attempt that recorded it."""

    stage: str
    payload: dict[str, Any]
    attempt: int
    recorded_at: datetime


@writes
def record_stage(session: Session, job: Job, stage: str, payload: Mapping[str, Any]) -> None:
    """Persist what a stage produced, replacing what an earlier attempt left. Raises ``LeaseLost``."""
    leases.hold(session, job)
    known = session.get(JobStageRow, (job.id, stage))
    if known is not None and known.attempt == job.attempt and known.payload == dict(payload):
        return
    row = {"job_id": job.id, "stage": stage, "attempt": job.attempt, "payload": dict(payload)}
    upsert.insert_or_replace(session, JobStageRow, [row], [JobStageRow.job_id, JobStageRow.stage])
    events.add(session, job.id, job.attempt, "stage_finished", stage)


@reads
def get(session: Session, job_id: int, stage: str) -> Stage | None:
    """Read what one stage of a job produced; None when it has not finished."""
    row = session.get(JobStageRow, (job_id, stage))
    return None if row is None else Stage(row.stage, row.payload, row.attempt, row.recorded_at)


@reads
def stages(session: Session, job_id: int) -> dict[str, Stage]:
    """Read the stages that a job has finished, by name, in the order in which they were recorded."""
    rows = session.scalars(
        select(JobStageRow).where(JobStageRow.job_id == job_id).order_by(JobStageRow.recorded_at, JobStageRow.stage)
    )
    return {row.stage: Stage(row.stage, row.payload, row.attempt, row.recorded_at) for row in rows}


@writes
def add_counters(session: Session, job: Job, increments: Mapping[str, float]) -> None:
    """Add to a job's counters, such as ``{"evaluations": 1}``. Raises ``LeaseLost``.

    Run twice by a connection that broke while the server committed, it may count twice.
    """
    leases.hold(session, job)
    for name in sorted(increments):  # one order for all, so that two writers cannot wait for each other
        statement = upsert.insert(session, JobCounterRow)
        statement = statement.on_conflict_do_update(
            index_elements=[JobCounterRow.job_id, JobCounterRow.name],
            set_={"value": JobCounterRow.value + statement.excluded.value},
        )
        session.execute(statement, [{"job_id": job.id, "name": name, "value": float(increments[name])}])


@reads
def counters(session: Session, job_id: int) -> dict[str, float]:
    """Read the counters of a job, by name."""
    rows = session.execute(
        select(JobCounterRow.name, JobCounterRow.value)
        .where(JobCounterRow.job_id == job_id)
        .order_by(JobCounterRow.name)
    )
    return {name: value for name, value in rows}  # noqa: C416  (rows are no pairs to the type checker)
