"""Queue jobs for the HTTP API: a request that is sent again under its idempotency key finds the job of the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import upsert
from storage.database import reads, writes
from storage.errors import KeyReused
from storage.queue import events, jobs
from storage.queue.jobs import Job
from storage.queue.tokens import Token
from storage.schema import SubmissionRow


@dataclass(frozen=True)
class Request:
    """Identify a submission: the ``content_hash`` of all that it asks for, and the idempotency key it came with."""

    content_hash: str
    key: str | None = None


@dataclass(frozen=True)
class Wanted:
    """A job to queue; unless ``anew``, one of the same ``spec_hash`` that has not failed is found instead."""

    spec: dict[str, Any]
    spec_hash: str
    priority: int
    max_attempts: int
    anew: bool = False


@writes
def submit(session: Session, token: Token, request: Request, wanted: Wanted) -> tuple[Job, bool]:
    """Queue a job for the bearer of ``token``; true if it was queued now.

    The key's row is written first: of several requests with the same key at once, the unique constraint lets one
    through, and the others wait for it and are given its job. Raises ``KeyReused``.
    """
    row = {"token_id": token.id, "key": request.key, "request_hash": request.content_hash, "queued_it": False}
    insert = upsert.insert(session, SubmissionRow).values(row)
    insert = insert.on_conflict_do_nothing(index_elements=[SubmissionRow.token_id, SubmissionRow.key])
    number = session.scalars(insert.returning(SubmissionRow.id)).one_or_none()
    if number is None:
        known = known_job(session, token, request)
        assert known is not None
        return known, False
    ask = (wanted.spec, wanted.spec_hash, wanted.priority, wanted.max_attempts)
    job, new = (jobs.submit(session, *ask), True) if wanted.anew else jobs.submit_once(session, *ask)
    kept = session.get_one(SubmissionRow, number)
    kept.job_id, kept.queued_it = job.id, new
    if new:
        events.add(session, job.id, 0, "requested", f"by token {token.name}")
    session.flush()
    return job, new


@reads
def known_job(session: Session, token: Token, request: Request) -> Job | None:
    """Find the job that the request's key was given before; None for a new key, or without one.

    Raises ``KeyReused``.
    """
    if request.key is None:
        return None
    query = select(SubmissionRow).where(SubmissionRow.token_id == token.id, SubmissionRow.key == request.key)
    row = session.scalars(query).one_or_none()
    if row is None:
        return None
    if row.request_hash != request.content_hash:
        raise KeyReused(f"idempotency key {request.key!r} was used for another request; choose a new one")
    assert row.job_id is not None
    return jobs.get(session, row.job_id)


@reads
def is_owner(session: Session, token: Token, job_id: int) -> bool:
    """Tell whether a job was queued for this token. Raises ``NotFound`` when there is no such job."""
    jobs.get(session, job_id)
    query = select(SubmissionRow.id).where(
        SubmissionRow.job_id == job_id, SubmissionRow.token_id == token.id, SubmissionRow.queued_it
    )
    return session.scalars(query.limit(1)).one_or_none() is not None
