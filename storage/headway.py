"""Whether an attempt at a job got anywhere: such an attempt is no sign of a job that can never end."""

from __future__ import annotations

from sqlalchemy import exists, func, or_, select
from sqlalchemy.orm import Session

from storage.schema import EvaluationRow, JobEventRow, JobStageRow


def made(session: Session, job_id: int, attempt: int) -> bool:
    """Whether this attempt recorded a stage, or an evaluation that it ran itself."""
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
