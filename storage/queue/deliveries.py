"""Keep the messages to hooks: written in the transaction that changes a job's state, sent later, at least once.

A sender claims a message for a while; where it dies, the message is due again. Times are the database's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from storage.database import Database, reads, writes
from storage.schema import HookDeliveryRow, JobRow
from storage.types import database_now

EVENTS = {"queued": "queued", "running": "running"}
"""What a job's state is called in a message; all others are its end."""


@dataclass(frozen=True)
class Delivery:
    """A message to one hook, how often it was tried, and how that ended."""

    id: int
    job_id: int
    target: str
    payload: dict[str, Any]
    attempts: int
    next_at: datetime | None
    delivered_at: datetime | None
    error: str | None
    created_at: datetime


def _delivery(row: HookDeliveryRow) -> Delivery:
    return Delivery(**{name: getattr(row, name) for name in Delivery.__dataclass_fields__})


def announce(session: Session, row: JobRow) -> None:
    """Queue a message about the state that a job has come to, for each of its hooks."""
    targets = row.spec.get("notify") or ()
    if not targets:
        return
    model = row.spec["model"]["path"]
    task = row.spec.get("task") or "+".join(sorted(goal["task"] for goal in row.spec.get("tasks") or ()))
    payload = {
        "event": EVENTS.get(row.state, "ended"),
        "job": row.id,
        "state": row.state,
        "attempt": row.attempt,
        "model": model,
        "task": task,
        "reason": row.error,
        "text": f"skipplan job {row.id} ({model} on {task}) is {row.state}{f': {row.error}' if row.error else ''}",
    }
    for target in targets:
        due = {"target": target, "payload": payload, "attempts": 0, "next_at": database_now()}
        session.add(HookDeliveryRow(job_id=row.id, **due))
    session.flush()


def claim(db: Database, lease_seconds: float) -> Delivery | None:
    """Take the message that has been due longest for ``lease_seconds``; None when none is due.

    Where none is, the database is only read.
    """
    return _claim(db, lease_seconds) if _any_due(db) else None


@reads
def _any_due(session: Session) -> bool:
    due = select(HookDeliveryRow.id).where(HookDeliveryRow.next_at <= database_now()).limit(1)
    return session.scalars(due).one_or_none() is not None


@writes
def _claim(session: Session, lease_seconds: float) -> Delivery | None:
    first = (
        select(HookDeliveryRow.id)
        .where(HookDeliveryRow.next_at <= database_now())
        .order_by(HookDeliveryRow.next_at, HookDeliveryRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    row = session.scalars(
        update(HookDeliveryRow)
        .where(HookDeliveryRow.id == first)
        .values(attempts=HookDeliveryRow.attempts + 1, next_at=database_now(lease_seconds))
        .returning(HookDeliveryRow)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return None if row is None else _delivery(row)


@writes
def record_delivered(session: Session, delivery: Delivery) -> None:
    """Note that the hook took a message."""
    values = {"delivered_at": database_now(), "next_at": None, "error": None}
    session.execute(update(HookDeliveryRow).where(HookDeliveryRow.id == delivery.id).values(values))


@writes
def record_failure(session: Session, delivery: Delivery, error: str, wait_seconds: float | None) -> None:
    """Note why a message did not arrive, to be tried again after ``wait_seconds``; never, where that is None."""
    again = None if wait_seconds is None else database_now(wait_seconds)
    mine = (HookDeliveryRow.id == delivery.id, HookDeliveryRow.delivered_at.is_(None))
    session.execute(update(HookDeliveryRow).where(*mine).values(error=error, next_at=again))


@reads
def for_job(session: Session, job_id: int) -> list[Delivery]:
    """List the messages about a job, oldest first."""
    rows = session.scalars(select(HookDeliveryRow).where(HookDeliveryRow.job_id == job_id).order_by(HookDeliveryRow.id))
    return [_delivery(row) for row in rows]
