"""The job queue: who runs what, since when, and what became of it.

A job is ``queued``, then ``running`` under a lease, then ``succeeded``, ``infeasible`` (no plan meets the constraint),
``failed`` or ``cancelled``. Whoever holds a lease writes for the job; the pair of ``owner`` and ``attempt`` in its
``Job`` proves it in every statement, so that a process that was believed dead cannot write over its successor.
Leases are judged by the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from storage.database import Database, reads, writes
from storage.errors import InvalidTransition, JobCancelled, LeaseLost, NotFound
from storage.queue import attempts, events
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


def _job(row: JobRow) -> Job:
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
    session.refresh(row)
    return _job(row)


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
    """A job that ``owner`` does itself, now or never: no service can take it, and when its lease ends, it fails."""
    job = submit(session, spec, spec_hash, max_attempts=1)
    row = session.get_one(JobRow, job.id)
    row.state, row.owner, row.attempt = "running", owner, 1
    row.lease_expires_at, row.started_at = database_now(lease_seconds), database_now()
    session.flush()
    events.add(session, row.id, 1, "claimed", f"by {owner}, to be done by it alone")
    session.refresh(row)
    return _job(row)


@reads
def find_finished(session: Session, spec_hash: str) -> Job | None:
    """The latest job of this spec that came to a result (succeeded or infeasible)."""
    return _latest(session, JobRow.spec_hash == spec_hash, JobRow.state.in_(("succeeded", "infeasible")))


def _latest(session: Session, *conditions: ColumnElement[bool]) -> Job | None:
    row = session.scalars(select(JobRow).where(*conditions).order_by(JobRow.id.desc()).limit(1)).one_or_none()
    return None if row is None else _job(row)


def claim(db: Database, owner: str, lease_seconds: float, job_id: int | None = None) -> Job | None:
    """Take the first job of the queue (or the given one) for ``owner``, or ``None`` when there is nothing to take.

    ``owner`` names one process, uniquely. Jobs whose lease ran out are put back first, those that used up their
    attempts fail with that reason. A job that waits after a failed attempt (see ``retry``) is only taken when asked
    for by its id. An idle queue is only read, so polling it disturbs nobody.
    """
    if not _anything_to_claim(db, job_id):
        return None
    return _claim(db, owner, lease_seconds, job_id)


@reads
def _anything_to_claim(session: Session, job_id: int | None) -> bool:
    queued = exists(select(JobRow.id).where(*_wanted(job_id)))
    return bool(session.scalar(select(or_(queued, exists(select(JobRow.id).where(_expired()))))))


def _wanted(job_id: int | None) -> tuple[ColumnElement[bool], ...]:
    if job_id is not None:
        return (JobRow.state == "queued", JobRow.id == job_id)
    return (JobRow.state == "queued", or_(JobRow.not_before.is_(None), JobRow.not_before <= database_now()))


@writes
def _claim(session: Session, owner: str, lease_seconds: float, job_id: int | None) -> Job | None:
    requeue_expired(session)
    first = (
        select(JobRow.id)
        .where(*_wanted(job_id))
        .order_by(JobRow.precedence, JobRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    row = session.scalars(
        update(JobRow)
        .where(JobRow.id == first, JobRow.state == "queued")
        .values(
            state="running",
            owner=owner,
            attempt=JobRow.attempt + 1,
            lease_expires_at=database_now(lease_seconds),
            started_at=func.coalesce(JobRow.started_at, database_now()),
            finished_at=None,
            not_before=None,
            error=None,
        )
        .returning(JobRow)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        return None
    events.add(session, row.id, row.attempt, "claimed", f"by {owner}, attempt {row.attempt}")
    return _job(row)


def _expired() -> ColumnElement[bool]:
    return (JobRow.state == "running") & (JobRow.lease_expires_at < database_now())


@writes
def requeue_expired(session: Session) -> list[int]:
    """Put back jobs whose owner stopped sending heartbeats, fail those out of attempts; the jobs concerned.

    An attempt that got somewhere does not count: a job that goes on a little each time will end.
    """
    lost = select(JobRow.id, JobRow.owner, JobRow.attempt, JobRow.attempt_limit).where(_expired())
    rows = session.execute(lost.with_for_update(skip_locked=True)).all()
    for row in rows:
        extra = int(attempts.made(session, row.id, row.attempt))
        if row.attempt < row.attempt_limit + extra:
            state, reason, message = "queued", None, f"lease of {row.owner} ran out; queued again"
        else:
            state, reason = "failed", f"its process died or hung {row.attempt} times, last {row.owner}; not tried again"
            message = reason
        session.execute(
            update(JobRow)
            .where(JobRow.id == row.id)
            .values(
                state=state,
                owner=None,
                lease_expires_at=None,
                attempt_limit=JobRow.attempt_limit + extra,
                error=reason,
                finished_at=None if state == "queued" else database_now(),
            )
        )
        events.add(session, row.id, row.attempt, "lease_expired", message)
    return [row.id for row in rows]


def _held(job: Job) -> tuple[ColumnElement[bool], ...]:
    """The conditions under which the holder of ``job`` may write."""
    return (
        JobRow.id == job.id,
        JobRow.state == "running",
        JobRow.owner == job.owner,
        JobRow.attempt == job.attempt,
    )


@reads
def hold(session: Session, job: Job) -> None:
    """Make sure that ``job`` is still held, and stays so until the end of this transaction.

    Raises ``LeaseLost`` (or ``JobCancelled``). To be called in the transaction that writes for the job.
    """
    held = session.execute(select(JobRow.id).where(*_held(job)).with_for_update(read=True)).one_or_none()
    if held is None:
        raise _lease_lost(session, job)


def _lease_lost(session: Session, job: Job) -> LeaseLost:
    now = session.execute(select(JobRow.state, JobRow.owner, JobRow.attempt).where(JobRow.id == job.id)).one_or_none()
    if now is None:
        return JobCancelled(f"job {job.id} was removed")
    if now.state == "cancelled":
        return JobCancelled(f"job {job.id} was cancelled")
    holder = f" by {now.owner}" if now.owner else ""
    return LeaseLost(
        f"job {job.id} is no longer held by {job.owner} (attempt {job.attempt}): it is {now.state}{holder} "
        f"(attempt {now.attempt})"
    )


@writes
def heartbeat(session: Session, job: Job, lease_seconds: float, progress: Mapping[str, Any] | None = None) -> datetime:
    """Extend the lease to ``lease_seconds`` from now, and say how far the job is; the new end of the lease.

    Raises ``LeaseLost``, or ``JobCancelled`` if a user cancelled the job.
    """
    values: dict[str, Any] = {"lease_expires_at": database_now(lease_seconds)}
    if progress is not None:
        values["progress"] = dict(progress)
    until = session.scalars(
        update(JobRow)
        .where(*_held(job))
        .values(values)
        .returning(JobRow.lease_expires_at)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if until is None:
        raise _lease_lost(session, job)
    return until


def finish(db: Database | Session, job: Job) -> Job:
    """The job has published its plans. Raises ``LeaseLost``."""
    return _end(db, job, "succeeded", None)


def infeasible(db: Database | Session, job: Job, reason: str) -> Job:
    """The search ended and no plan meets the constraint: a result, not a failure. Raises ``LeaseLost``."""
    return _end(db, job, "infeasible", reason)


def fail(db: Database | Session, job: Job, reason: str) -> Job:
    """The job cannot be done, for a reason that another attempt would meet too. Raises ``LeaseLost``."""
    return _end(db, job, "failed", reason)


@writes
def _end(session: Session, job: Job, state: str, reason: str | None) -> Job:
    now = session.get(JobRow, job.id)
    if now is not None and now.state == state and now.attempt == job.attempt:
        return _job(now)  # said twice, because the first answer was lost with the connection
    values = {"state": state, "error": reason, "owner": None, "lease_expires_at": None, "finished_at": database_now()}
    return _transition(session, job, values, state, reason or "")


@writes
def release(session: Session, job: Job, reason: str = "released") -> Job:
    """Put a running job back at its place in the queue, without counting the attempt. Raises ``LeaseLost``."""
    values = {
        "state": "queued",
        "owner": None,
        "lease_expires_at": None,
        "attempt_limit": JobRow.attempt_limit + 1,
    }
    return _transition(session, job, values, "released", reason)


@writes
def retry(session: Session, job: Job, reason: str, wait_seconds: float) -> Job:
    """Put a running job back because its surroundings failed, to be taken again after ``wait_seconds``.

    The attempt counts unless it got somewhere; when none is left, the job fails with ``reason``. Raises ``LeaseLost``.
    """
    extra = int(attempts.made(session, job.id, job.attempt))
    limit = session.scalar(select(JobRow.attempt_limit).where(JobRow.id == job.id)) or 0
    if job.attempt >= limit + extra:
        return _end(session, job, "failed", f"{reason} (attempt {job.attempt}, the last one)")
    values = {
        "state": "queued",
        "owner": None,
        "lease_expires_at": None,
        "attempt_limit": JobRow.attempt_limit + extra,
        "not_before": database_now(wait_seconds),
    }
    return _transition(session, job, values, "retry", f"{reason}; queued again, not before {wait_seconds:g} s from now")


def _transition(session: Session, job: Job, values: dict[str, Any], kind: str, message: str) -> Job:
    row = session.scalars(
        update(JobRow)
        .where(*_held(job))
        .values(values)
        .returning(JobRow)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if row is None:
        raise _lease_lost(session, job)
    events.add(session, job.id, job.attempt, kind, message)
    return _job(row)


@writes
def cancel(session: Session, job_id: int, reason: str = "cancelled by a user") -> Job:
    """Stop a queued or running job; whoever runs it meets ``JobCancelled`` at its next write or heartbeat.

    Raises ``NotFound``, or ``InvalidTransition`` if the job has ended otherwise.
    """
    row = _locked(session, job_id)
    if row.state == "cancelled":
        return _job(row)
    if row.state not in ("queued", "running"):
        raise InvalidTransition(f"job {job_id} is {row.state} already; there is nothing to cancel")
    row.state, row.owner, row.lease_expires_at, row.error = "cancelled", None, None, reason
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
    return _changed(session, row, {}, "resumed", "queued again by a user")


@writes
def remove(session: Session, job_id: int) -> None:
    """Delete a job with its events, stages, evaluations and plans; the fronts are computed anew without it.

    Raises ``NotFound``, or ``InvalidTransition`` while the job runs.
    """
    row = _locked(session, job_id)
    if row.state == "running":
        raise InvalidTransition(f"job {job_id} is running; cancel it first")
    from storage import pareto

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
    return _job(row)


@reads
def get(session: Session, job_id: int) -> Job:
    """One job. Raises ``NotFound``."""
    row = session.get(JobRow, job_id)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return _job(row)


@reads
def list_jobs(
    session: Session, states: Sequence[str] = (), limit: int | None = 100, before: int | None = None
) -> list[Job]:
    """Jobs, newest first, of the given states (all of them by default); ``before`` a job id, to go on reading.

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
    return [_job(row) for row in session.scalars(query)]


@reads
def count(session: Session) -> dict[str, int]:
    """How many jobs are in each state, every state named."""
    rows = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
    found = dict(rows.all())
    return {state: found.get(state, 0) for state in JOB_STATES}
