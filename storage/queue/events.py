"""Keep the history of jobs: every transition of the queue, and what else their owners report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.database import reads, writes
from storage.schema import JobEventRow


@dataclass(frozen=True)
class Event:
    """One entry of a job's history."""

    id: int
    job_id: int
    at: datetime
    attempt: int
    kind: str
    message: str
    data: dict[str, Any]


@writes
def add(
    session: Session, job_id: int, attempt: int, kind: str, message: str, data: Mapping[str, Any] | None = None
) -> None:
    """Append to the history. Run twice by a broken connection, it may add the same entry twice."""
    session.add(JobEventRow(job_id=job_id, attempt=attempt, kind=kind, message=message, data=dict(data or {})))
    session.flush()


@reads
def for_job(session: Session, job_id: int, after: int = 0, limit: int | None = None) -> list[Event]:
    """Read the history of a job, oldest first; ``after`` the id of an event, to watch for new ones."""
    rows = session.scalars(
        select(JobEventRow)
        .where(JobEventRow.job_id == job_id, JobEventRow.id > after)
        .order_by(JobEventRow.id)
        .limit(limit)
    )
    return [Event(row.id, row.job_id, row.at, row.attempt, row.kind, row.message, row.data) for row in rows]
