"""Claim jobs and write for them: who runs what, since when, and how it ended.

Whoever holds a lease writes for the job; the pair of ``owner`` and ``attempt`` in its ``Job`` proves it in every
statement, so that a process that was believed dead cannot write over its successor. Leases are judged by the
database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, exists, func, or_, select, update
from sqlalchemy.orm import Session

from storage.database import Database, reads, writes
from storage.errors import JobCancelled, LeaseLost
from storage.queue import attempts, deliveries, events
from storage.queue.jobs import Job, job_of
from storage.schema import JobRow
from storage.types import database_now


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
    deliveries.announce(session, row)
    return job_of(row)


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
        deliveries.announce(session, session.get_one(JobRow, row.id, populate_existing=True))
    return [row.id for row in rows]


def _held(job: Job) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions under which the holder of ``job`` may write."""
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


@writes
def identify(session: Session, job: Job, spec_hash: str) -> None:
    """Let a claimed job be found by the hash of what it is run with, if that changed since it was queued.

    Raises ``LeaseLost``.
    """
    if job.spec_hash != spec_hash:
        hold(session, job)
        session.execute(update(JobRow).where(JobRow.id == job.id).values(spec_hash=spec_hash))


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
    """End a job that has published its plans. Raises ``LeaseLost``."""
    return _end(db, job, "succeeded", None)


def infeasible(db: Database | Session, job: Job, reason: str) -> Job:
    """End a job of which no plan meets the constraint: a result, not a failure. Raises ``LeaseLost``."""
    return _end(db, job, "infeasible", reason)


def fail(db: Database | Session, job: Job, reason: str) -> Job:
    """End a job that cannot be done, for a reason that another attempt would meet too. Raises ``LeaseLost``."""
    return _end(db, job, "failed", reason)


@writes
def _end(session: Session, job: Job, state: str, reason: str | None) -> Job:
    now = session.get(JobRow, job.id)
    if now is not None and now.state == state and now.attempt == job.attempt:
        return job_of(now)  # idempotent: the first reply was lost with the connection
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
    return _queue_later(session, job, "retry", reason, wait_seconds, extra)


@writes
def put_off(
    session: Session,
    job: Job,
    kind: Literal["cluster_lost", "cluster_away"],
    reason: str,
    wait_seconds: float,
    most: int,
) -> Job:
    """Put a running job back, to be taken again after ``wait_seconds``, without counting the attempt.

    Where this happens ``most`` times in a row, and nothing was recorded in between, the job fails with ``reason``.
    Raises ``LeaseLost``.
    """
    times = 1 if attempts.made(session, job.id, job.attempt) else 1 + attempts.without_progress(session, job.id, kind)
    if times >= most:
        return _end(session, job, "failed", f"{reason} ({times} times in a row, with nothing recorded in between)")
    return _queue_later(session, job, kind, reason, wait_seconds, 1)


def _queue_later(session: Session, job: Job, kind: str, reason: str, wait_seconds: float, extra: int) -> Job:
    values = {
        "state": "queued",
        "owner": None,
        "lease_expires_at": None,
        "attempt_limit": JobRow.attempt_limit + extra,
        "not_before": database_now(wait_seconds),
    }
    return _transition(session, job, values, kind, f"{reason}; queued again, not before {wait_seconds:g} s from now")


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
    deliveries.announce(session, row)
    return job_of(row)
