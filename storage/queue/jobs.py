"""The job queue's jobs: submit, find and read them, and what a user does to them (cancel, resume, remove).

A job is ``queued``, then ``running`` under a lease (see ``storage.queue.leases``), then ``succeeded``, ``infeasible``
(no plan meets the constraint), ``failed`` or ``cancelled``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from storage import pareto
from storage.database import reads, writes
from storage.errors import InvalidTransition, NotFound
from storage.queue import deliveries, events
from storage.schema import JOB_STATES, JobRow
from storage.types import database_now

MAX_ATTEMPTS = 5
"""How often a job is begun, unless submitted otherwise, before it counts as one that kills its processes."""

FINISHED_STATES = ("succeeded", "infeasible", "failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """A job as it was when read. ``owner`` and ``attempt`` are the proof of a claim."""

    id: int
    spec: dict[str, Any]
    spec_hash: str
    state: str
    priority: int
    owner: str | None
    attempt: int
    attempt_limit: int
    lease_expires_at: datetime | None
    progress: dict[str, Any]
    error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    not_before: datetime | None = None
    """A queued job is not taken from the queue before; set by ``retry``."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen to it any more unless somebody resumes it."""
        return self.state in FINISHED_STATES


_SAME = tuple(field.name for field in fields(Job) if field.name != "priority")


def job_of(row: JobRow) -> Job:
    """Read a job from its row."""
    return Job(priority=-row.precedence, **{name: getattr(row, name) for name in _SAME})


@writes
def submit(
    session: Session, spec: dict[str, Any], spec_hash: str, priority: int = 0, max_attempts: int = MAX_ATTEMPTS
) -> Job:
    """Queue a job, even if there is one of the same spec; higher priorities are claimed first.

    If the connection breaks just while the server commits, the job may be queued twice; ``submit_once`` is not
    open to that.
    """
    row = JobRow(
        spec=spec,
        spec_hash=spec_hash,
        state="queued",
        precedence=-priority,
        attempt=0,
        attempt_limit=max_attempts,
        progress={},
    )
    session.add(row)
    session.flush()
    events.add(session, row.id, 0, "submitted", f"queued with priority {priority}")
    deliveries.announce(session, row)
    session.refresh(row)
    return job_of(row)


@writes
def submit_once(
    session: Session, spec: dict[str, Any], spec_hash: str, priority: int = 0, max_attempts: int = MAX_ATTEMPTS
) -> tuple[Job, bool]:
    """Queue a job unless one of the same spec is queued, running or has come to a result; true if it was queued."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite's transactions are alone in any case
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(spec_hash))))
    known = _latest(session, JobRow.spec_hash == spec_hash, JobRow.state.not_in(("failed", "cancelled")))
    if known is not None:
        return known, False
    return submit(session, spec, spec_hash, priority, max_attempts), True


@writes
def submit_claimed(session: Session, spec: dict[str, Any], spec_hash: str, owner: str, lease_seconds: float) -> Job:
    """Queue and claim a job that ``owner`` does itself: no service can take it, and when its lease ends, it fails."""
    job = submit(session, spec, spec_hash, max_attempts=1)
    row = session.get_one(JobRow, job.id)
    row.state, row.owner, row.attempt = "running", owner, 1
    row.lease_expires_at, row.started_at = database_now(lease_seconds), database_now()
    session.flush()
    events.add(session, row.id, 1, "claimed", f"by {owner}, to be done by it alone")
    session.refresh(row)
    return job_of(row)


@reads
def find_finished(session: Session, spec_hash: str) -> Job | None:
    """Find the latest job of this spec that came to a result (succeeded or infeasible)."""
    return _latest(session, JobRow.spec_hash == spec_hash, JobRow.state.in_(("succeeded", "infeasible")))


def _latest(session: Session, *conditions: ColumnElement[bool]) -> Job | None:
    row = session.scalars(select(JobRow).where(*conditions).order_by(JobRow.id.desc()).limit(1)).one_or_none()
    return None if row is None else job_of(row)


@writes
def cancel(session: Session, job_id: int, reason: str = "cancelled by a user") -> Job:
    """Stop a queued or running job; whoever runs it meets ``JobCancelled`` at its next write or heartbeat.

    Raises ``NotFound``, or ``InvalidTransition`` if the job has ended otherwise.
    """
    row = _locked(session, job_id)
    if row.state == "cancelled":
        return job_of(row)
    if row.state not in ("queued", "running"):
        raise InvalidTransition(f"job {job_id} is {row.state} already; there is nothing to cancel")
    row.state, row.owner, row.lease_expires_at, row.error = "cancelled", None, None, reason
    deliveries.announce(session, row)
    return _changed(session, row, {"finished_at": database_now()}, "cancelled", reason)


@writes
def resume(session: Session, job_id: int, max_attempts: int = MAX_ATTEMPTS) -> Job:
    """Queue a failed or cancelled job again; it goes on after the last stage that it recorded.

    Raises ``NotFound``, or ``InvalidTransition`` if the job is not failed or cancelled.
    """
    row = _locked(session, job_id)
    if row.state not in ("failed", "cancelled"):
        raise InvalidTransition(f"job {job_id} is {row.state}; only failed and cancelled jobs can be resumed")
    row.state, row.error, row.finished_at, row.not_before = "queued", None, None, None
    row.attempt_limit = row.attempt + max_attempts
    deliveries.announce(session, row)
    return _changed(session, row, {}, "resumed", "queued again by a user")


@writes
def prioritize(session: Session, job_id: int, priority: int) -> Job:
    """Change the priority of a job that has not ended; a running one has it when it is put back.

    Raises ``NotFound``, or ``InvalidTransition`` if the job has ended.
    """
    row = _locked(session, job_id)
    if row.state in FINISHED_STATES:
        raise InvalidTransition(f"job {job_id} is {row.state}; only jobs that have not ended have a priority")
    if row.precedence == -priority:
        return job_of(row)
    row.precedence = -priority
    return _changed(session, row, {}, "prioritized", f"priority {priority}")


@writes
def remove(session: Session, job_id: int) -> None:
    """Delete a job with its events, stages, evaluations and plans; the fronts are computed anew without it.

    Raises ``NotFound``, or ``InvalidTransition`` while the job runs.
    """
    row = _locked(session, job_id)
    if row.state == "running":
        raise InvalidTransition(f"job {job_id} is running; cancel it first")
    groups = pareto.groups_of_job(session, job_id)
    pareto.lock(session, groups)
    session.execute(delete(JobRow).where(JobRow.id == job_id))
    for group in groups:
        pareto.recompute(session, group)


def _locked(session: Session, job_id: int) -> JobRow:
    row = session.get(JobRow, job_id, with_for_update=True, populate_existing=True)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return row


def _changed(session: Session, row: JobRow, values: dict[str, Any], kind: str, message: str) -> Job:
    session.flush()
    if values:
        session.execute(update(JobRow).where(JobRow.id == row.id).values(values))
    events.add(session, row.id, row.attempt, kind, message)
    session.refresh(row)
    return job_of(row)


@reads
def get(session: Session, job_id: int) -> Job:
    """Read one job. Raises ``NotFound``."""
    row = session.get(JobRow, job_id)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return job_of(row)


@reads
def list_jobs(
    session: Session, states: Sequence[str] = (), limit: int | None = 100, before: int | None = None
) -> list[Job]:
    """List jobs, newest first, of the given states (all of them by default); ``before`` a job id, to go on reading.

    Raises ``NotFound`` for a word that is no state.
    """
    for state in states:
        if state not in JOB_STATES:
            raise NotFound(f"{state!r} is no state of a job; the states are {', '.join(JOB_STATES)}")
    query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
    if states:
        query = query.where(JobRow.state.in_(states))
    if before is not None:
        query = query.where(JobRow.id < before)
    return [job_of(row) for row in session.scalars(query)]


@reads
def count(session: Session) -> dict[str, int]:
    """Count the jobs in each state, every state named."""
    rows = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
    found = dict(rows.all())
    return {state: found.get(state, 0) for state in JOB_STATES}
