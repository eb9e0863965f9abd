"""Tell attempts that recorded a stage or a new evaluation, which do not count against ``max_attempts``."""

from __future__ import annotations

from itertools import takewhile

from sqlalchemy import exists, func, or_, select
from sqlalchemy.orm import Session

from storage.database import reads
from storage.schema import EvaluationRow, JobEventRow, JobStageRow

MOST_RETRIES = 32
"""More in a row are not told apart."""

RETRIES = ("retry", "cluster_lost", "cluster_away")
"""Events of a job that went back to the queue because its surroundings failed: ``retry`` counted as an attempt."""


def made(session: Session, job_id: int, attempt: int) -> bool:
    """Tell whether this attempt recorded a stage, or an evaluation that it ran itself."""
    claimed_at = (
        select(func.max(JobEventRow.at))
        .where(JobEventRow.job_id == job_id, JobEventRow.attempt == attempt, JobEventRow.kind == "claimed")
        .scalar_subquery()
    )
    evaluated = exists(
        select(EvaluationRow.id).where(
            EvaluationRow.job_id == job_id,
            EvaluationRow.failure.is_(None),
            EvaluationRow.reused_from.is_(None),
            EvaluationRow.recorded_at > claimed_at,
        )
    )
    finished = exists(select(JobStageRow.stage).where(JobStageRow.job_id == job_id, JobStageRow.attempt == attempt))
    return bool(session.scalar(select(or_(evaluated, finished))))


@reads
def got_somewhere(session: Session, job_id: int) -> bool:
    """Tell whether the job has recorded a stage, or an evaluation of any kind, in any attempt."""
    evaluated = exists(select(EvaluationRow.id).where(EvaluationRow.job_id == job_id))
    finished = exists(select(JobStageRow.stage).where(JobStageRow.job_id == job_id))
    return bool(session.scalar(select(or_(evaluated, finished))))


@reads
def retries_in_a_row(session: Session, job_id: int) -> int:
    """Count how often the job was last put back because its surroundings failed, with nothing else between."""
    return len(_last_retries(session, job_id))


def without_progress(session: Session, job_id: int, kind: str) -> int:
    """Count the events of one kind of retry since the last attempt that got somewhere, or anything else happened."""
    fruitless = takewhile(lambda event: not made(session, job_id, event[1]), _last_retries(session, job_id))
    return sum(event[0] == kind for event in fruitless)


def _last_retries(session: Session, job_id: int) -> list[tuple[str, int]]:
    events = session.execute(
        select(JobEventRow.kind, JobEventRow.attempt)
        .where(JobEventRow.job_id == job_id, JobEventRow.kind != "claimed")
        .order_by(JobEventRow.id.desc())
        .limit(MOST_RETRIES)
    )
    return list(takewhile(lambda event: event[0] in RETRIES, ((row.kind, row.attempt) for row in events)))
