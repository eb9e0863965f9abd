"""What every plan scored on every rung: written once, found again by later attempts and later jobs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from storage import upsert
from storage.database import reads, writes
from storage.errors import InvalidValue, NotFound
from storage.queue import jobs
from storage.queue.jobs import Job
from storage.records import scores
from storage.schema import EvaluationRow

NO_COMPENSATION = "none"
_SPENT = ("seconds", "layer_executions", "layer_executions_saved")
"""What a reused evaluation did not cost again."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one plan on one rung of a split, or the reason of their lack (``failure``)."""

    id: int
    job_id: int
    model_id: int
    task_id: int
    plan: str
    compensation: str
    settings: str
    split: str
    split_hash: str
    rung: int
    n: int
    accuracy: float | None
    scores: tuple[float, ...]
    secondary: dict[str, float]
    seconds: float
    failure: str | None
    reused_from: int | None
    recorded_at: datetime
    kl: tuple[float, ...] | None = None
    """Per sample, in nats; NaN where a sample failed. None where it was not measured."""
    layer_executions: int = 0
    layer_executions_saved: int = 0
    artefact: str | None = None
    """Where the compensation's maps lie that the plan was evaluated with; None where they were fitted on the way."""
    artefact_checksum: str | None = None


def _evaluation(row: EvaluationRow) -> Evaluation:
    return Evaluation(
        id=row.id,
        job_id=row.job_id,
        model_id=row.model_id,
        task_id=row.task_id,
        plan=row.plan,
        compensation=row.compensation,
        settings=row.settings,
        split=row.split,
        split_hash=row.split_hash,
        rung=row.rung,
        n=row.n,
        accuracy=row.accuracy,
        scores=scores.unpack(row.scores, row.n),
        secondary=row.secondary,
        seconds=row.seconds,
        failure=row.failure,
        reused_from=row.reused_from,
        recorded_at=row.recorded_at,
        kl=None if row.kl is None else scores.unpack_divergences(row.kl, row.n),
        layer_executions=row.layer_executions,
        layer_executions_saved=row.layer_executions_saved,
        artefact=row.artefact,
        artefact_checksum=row.artefact_checksum,
    )


@writes
def record(
    session: Session,
    job: Job,
    *,
    model_id: int,
    task_id: int,
    plan: str,
    split: str,
    split_hash: str,
    rung: int,
    sample_scores: Sequence[float],
    seconds: float,
    secondary: Mapping[str, float] | None = None,
    compensation: str = NO_COMPENSATION,
    settings: str = "",
    kl: Sequence[float] | None = None,
    layer_executions: int = 0,
    layer_executions_saved: int = 0,
    artefact: str | None = None,
    artefact_checksum: str | None = None,
) -> Evaluation:
    """Persist the scores of ``plan`` on the samples that ``split_hash`` and ``rung`` name, in their order.

    Idempotent by job, plan, compensation, split and rung: what was recorded first stays and is returned; only a
    recorded failure gives way to scores. Raises ``LeaseLost``, or ``InvalidValue`` for no scores or one outside [0, 1].
    """
    if not sample_scores:
        raise InvalidValue(f"evaluation of {plan} has no scores; record a failure instead")
    if kl is not None and len(kl) != len(sample_scores):
        raise InvalidValue(f"evaluation of {plan} has {len(sample_scores)} scores and {len(kl)} divergences")
    outcome = {
        "n": len(sample_scores),
        "accuracy": math.fsum(sample_scores) / len(sample_scores),
        "scores": scores.pack(sample_scores),
        "secondary": dict(secondary or {}),
        "seconds": seconds,
        "failure": None,
        "reused_from": None,
        "kl": None if kl is None else scores.pack_divergences(kl),
        "layer_executions": layer_executions,
        "layer_executions_saved": layer_executions_saved,
        "artefact": artefact,
        "artefact_checksum": artefact_checksum,
    }
    identity = _identity(job, model_id, task_id, plan, compensation, settings, split, split_hash, rung)
    return _write(session, job, identity | outcome)


@writes
def record_failure(
    session: Session,
    job: Job,
    *,
    model_id: int,
    task_id: int,
    plan: str,
    split: str,
    split_hash: str,
    rung: int,
    reason: str,
    seconds: float = 0.0,
    compensation: str = NO_COMPENSATION,
    settings: str = "",
) -> Evaluation:
    """Persist that ``plan`` could not be evaluated, and why. Never replaces scores. Raises ``LeaseLost``."""
    outcome: dict[str, Any] = {
        "n": 0,
        "accuracy": None,
        "scores": scores.pack(()),
        "secondary": {},
        "seconds": seconds,
        "failure": reason,
        "reused_from": None,
        "kl": None,
        "layer_executions": 0,
        "layer_executions_saved": 0,
    }
    identity = _identity(job, model_id, task_id, plan, compensation, settings, split, split_hash, rung)
    return _write(session, job, identity | outcome)


@writes
def reuse(session: Session, job: Job, evaluation_id: int, rung: int | None = None) -> Evaluation:
    """Take an evaluation of an earlier job over into ``job``, without having run anything.

    ``rung`` is its number in this job where that differs. Raises ``LeaseLost`` or ``NotFound``.
    """
    row = session.get(EvaluationRow, evaluation_id)
    if row is None or row.failure is not None:
        raise NotFound(f"there is no successful evaluation {evaluation_id}")
    same = {
        column: getattr(row, column)
        for column in EvaluationRow.__table__.columns.keys()  # noqa: SIM118  (iterating gives columns)
        if column not in ("id", "job_id", "rung", "reused_from", "recorded_at", *_SPENT)
    }
    new = dict.fromkeys(_SPENT, 0) | {
        "job_id": job.id,
        "rung": row.rung if rung is None else rung,
        "reused_from": row.id,
    }
    return _write(session, job, same | new)


def _identity(
    job: Job,
    model_id: int,
    task_id: int,
    plan: str,
    compensation: str,
    settings: str,
    split: str,
    split_hash: str,
    rung: int,
) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "model_id": model_id,
        "task_id": task_id,
        "plan": plan,
        "compensation": compensation,
        "settings": settings,
        "split": split,
        "split_hash": split_hash,
        "rung": rung,
    }


_KEY = (
    EvaluationRow.job_id,
    EvaluationRow.plan,
    EvaluationRow.compensation,
    EvaluationRow.split,
    EvaluationRow.rung,
)


def _write(session: Session, job: Job, values: dict[str, Any]) -> Evaluation:
    jobs.hold(session, job)
    if values["failure"] is None:
        failed = EvaluationRow.failure.is_not(None)
        upsert.insert_or_replace(session, EvaluationRow, [values], _KEY, where=failed)
    else:
        upsert.insert_or_keep(session, EvaluationRow, [values], _KEY)
    query = select(EvaluationRow).where(*(column == values[column.key] for column in _KEY))
    row = session.scalars(query.execution_options(populate_existing=True)).one()
    if row.split_hash != values["split_hash"] or row.model_id != values["model_id"]:
        raise InvalidValue(
            f"job {job.id} already holds {row.plan} on rung {row.rung} of {row.split}, but of other samples"
        )
    return _evaluation(row)


@reads
def for_job(session: Session, job_id: int, split: str | None = None) -> list[Evaluation]:
    """All evaluations of a job (on one split), in the order in which they were recorded."""
    query = select(EvaluationRow).where(EvaluationRow.job_id == job_id).order_by(EvaluationRow.id)
    if split is not None:
        query = query.where(EvaluationRow.split == split)
    return [_evaluation(row) for row in session.scalars(query)]


@reads
def find(
    session: Session,
    *,
    model_id: int,
    task_id: int,
    split_hash: str,
    plan: str,
    rung: int | None = None,
    n: int | None = None,
    compensation: str = NO_COMPENSATION,
    settings: str = "",
) -> Evaluation | None:
    """A successful evaluation of the same plan on the same samples, by any job; the oldest, or ``None``.

    ``rung`` or ``n`` narrows it down where ``split_hash`` names a whole split and rungs are nested parts of it.
    """
    query = _known(model_id, task_id, split_hash, settings).where(
        EvaluationRow.plan == plan, EvaluationRow.compensation == compensation
    )
    if rung is not None:
        query = query.where(EvaluationRow.rung == rung)
    if n is not None:
        query = query.where(EvaluationRow.n == n)
    row = session.scalars(query.limit(1)).one_or_none()
    return None if row is None else _evaluation(row)


@reads
def known(
    session: Session, *, model_id: int, task_id: int, split_hash: str, settings: str = "", limit: int | None = None
) -> list[Evaluation]:
    """Everything ever measured, by any job, on these samples; each plan and rung once, oldest first."""
    query = _known(model_id, task_id, split_hash, settings).where(EvaluationRow.reused_from.is_(None)).limit(limit)
    first: dict[tuple[str, str, int], EvaluationRow] = {}
    for row in session.scalars(query):
        first.setdefault((row.plan, row.compensation, row.n), row)
    return [_evaluation(row) for row in first.values()]


def _known(model_id: int, task_id: int, split_hash: str, settings: str) -> Select[EvaluationRow]:
    return (
        select(EvaluationRow)
        .where(
            EvaluationRow.model_id == model_id,
            EvaluationRow.task_id == task_id,
            EvaluationRow.split_hash == split_hash,
            EvaluationRow.settings == settings,
            EvaluationRow.failure.is_(None),
        )
        .order_by(EvaluationRow.id)
    )
