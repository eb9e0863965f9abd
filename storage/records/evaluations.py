"""Keep what every plan scored: written once, found again by later attempts and later jobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import upsert
from storage.database import reads, writes
from storage.errors import InvalidValue, NotFound
from storage.queue import leases
from storage.queue.jobs import Job
from storage.records import scores
from storage.schema import EvaluationRow

NO_COMPENSATION = "none"


@dataclass(frozen=True, kw_only=True)
class EvaluationKey:
    """Names what was evaluated: a plan, on the first samples of a split."""

    model_id: int
    task_id: int
    plan: str
    compensation: str = NO_COMPENSATION
    settings: str = ""
    """What else may change an answer, such as the dtype and the attention kernel."""
    split: str
    split_hash: str
    n_samples: int


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores and other findings of an evaluation, and what it cost."""

    scores: Sequence[float]
    """Per sample, in [0, 1], in the split's order; NaN where a sample failed, which the accuracy leaves out."""
    secondary: dict[str, float] = field(default_factory=dict)
    kl: Sequence[float] | None = None
    """Per sample, in nats; NaN where a sample failed. None where it was not measured."""
    seconds: float = 0.0
    """Of a worker's time."""
    layer_executions: int = 0
    layer_executions_saved: int = 0
    artifact: str | None = None
    """Where the compensation's maps lie that the plan was evaluated with; None where they were fitted on the way."""
    artifact_checksum: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    id: int
    job_id: int
    accuracy: float | None
    failure: str | None
    reused_from: int | None
    """The evaluation of an earlier job that this one was taken from; it then cost nothing."""
    recorded_at: datetime


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary(_Recorded, EvaluationKey):
    """An evaluation without its per-sample scores."""

    seconds: float
    layer_executions: int
    layer_executions_saved: int


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(_Recorded, EvaluationResult, EvaluationKey):
    """Scores of one plan on the first samples of a split, or the reason of their lack (``failure``)."""

    scores: tuple[float, ...]
    kl: tuple[float, ...] | None


def _record(row: EvaluationRow) -> EvaluationRecord:
    values = {each.name: getattr(row, each.name) for each in fields(EvaluationRecord)}
    values["scores"] = () if row.failure is not None else scores.unpack(row.scores, row.n_samples)
    values["kl"] = None if row.kl is None else scores.unpack_divergences(row.kl, row.n_samples)
    return EvaluationRecord(**values)


@writes
def record(session: Session, job: Job, key: EvaluationKey, result: EvaluationResult) -> EvaluationRecord:
    """Persist what a plan scored on the samples that ``key`` names.

    Idempotent by job, task, plan, compensation, split and number of samples: what was recorded first stays and is
    returned; only a recorded failure gives way to scores. Raises ``LeaseLost``, or ``InvalidValue`` for a score
    outside [0, 1] and for other than ``key.n_samples`` scores.
    """
    n = key.n_samples
    if not result.scores:
        raise InvalidValue(f"evaluation of {key.plan} has no scores; record a failure instead")
    if len(result.scores) != n or len(result.kl or result.scores) != n:
        kl = "no" if result.kl is None else len(result.kl)
        raise InvalidValue(f"evaluation of {key.plan} on {n} samples has {len(result.scores)} scores, {kl} divergences")
    answered = [score for score in result.scores if not math.isnan(score)]
    if not answered:
        raise InvalidValue(f"evaluation of {key.plan}: every sample failed; record a failure instead")
    outcome = {
        "accuracy": math.fsum(answered) / len(answered),
        "scores": scores.pack(result.scores),
        "kl": None if result.kl is None else scores.pack_divergences(result.kl),
    }
    return _write(session, job, key, asdict(result) | outcome)


@writes
def record_failure(session: Session, job: Job, key: EvaluationKey, reason: str) -> EvaluationRecord:
    """Persist that a plan could not be evaluated, and why. Never replaces scores. Raises ``LeaseLost``."""
    nothing = asdict(EvaluationResult(scores=())) | {"scores": scores.pack(()), "accuracy": None}
    return _write(session, job, key, nothing | {"failure": reason})


@writes
def reuse(session: Session, job: Job, evaluation_id: int) -> EvaluationRecord:
    """Take an evaluation of an earlier job over into ``job``, without having run anything.

    Raises ``LeaseLost`` or ``NotFound``.
    """
    row = session.get(EvaluationRow, evaluation_id)
    if row is None or row.failure is not None:
        raise NotFound(f"there is no successful evaluation {evaluation_id}")
    key = EvaluationKey(**{each.name: getattr(row, each.name) for each in fields(EvaluationKey)})
    same = {each.name: getattr(row, each.name) for each in fields(EvaluationResult)}
    spent = {"seconds": 0.0, "layer_executions": 0, "layer_executions_saved": 0}
    return _write(session, job, key, same | spent | {"accuracy": row.accuracy, "reused_from": row.id})


_KEY = (
    EvaluationRow.job_id,
    EvaluationRow.task_id,
    EvaluationRow.plan,
    EvaluationRow.compensation,
    EvaluationRow.split,
    EvaluationRow.n_samples,
)


def _write(session: Session, job: Job, key: EvaluationKey, outcome: dict[str, Any]) -> EvaluationRecord:
    leases.hold(session, job)
    values = {"job_id": job.id, "failure": None, "reused_from": None} | asdict(key) | outcome
    if values["failure"] is None:
        failed = EvaluationRow.failure.is_not(None)
        upsert.insert_or_replace(session, EvaluationRow, [values], _KEY, where=failed)
    else:
        upsert.insert_or_keep(session, EvaluationRow, [values], _KEY)
    query = select(EvaluationRow).where(*(column == values[column.key] for column in _KEY))
    row = session.scalars(query.execution_options(populate_existing=True)).one()
    if row.split_hash != key.split_hash or row.model_id != key.model_id:
        raise InvalidValue(
            f"job {job.id} already holds {row.plan} on {row.n_samples} samples of {row.split}, but of other samples"
        )
    return _record(row)


@reads
def for_job(
    session: Session, job_id: int, split: str | None = None, *, task_id: int | None = None
) -> list[EvaluationRecord]:
    """Read all evaluations of a job (on one split, of one task), in the order in which they were recorded."""
    query = select(EvaluationRow).where(EvaluationRow.job_id == job_id).order_by(EvaluationRow.id)
    if split is not None:
        query = query.where(EvaluationRow.split == split)
    if task_id is not None:
        query = query.where(EvaluationRow.task_id == task_id)
    return [_record(row) for row in session.scalars(query)]


@reads
def summaries(session: Session, job_id: int) -> list[EvaluationSummary]:
    """Read all evaluations of a job without their scores, in the order in which they were recorded."""
    columns = [getattr(EvaluationRow, each.name) for each in fields(EvaluationSummary)]
    query = select(*columns).where(EvaluationRow.job_id == job_id).order_by(EvaluationRow.id)
    return [EvaluationSummary(**row._mapping) for row in session.execute(query)]


@reads
def sample_scores(session: Session, evaluation_id: int) -> tuple[float, ...]:
    """Read the per-sample scores of one evaluation, in the split's order; empty when there is none of that id."""
    row = session.get(EvaluationRow, evaluation_id)
    return () if row is None or row.failure is not None else scores.unpack(row.scores, row.n_samples)


@reads
def known(
    session: Session, *, model_id: int, task_id: int, split_hash: str, settings: str = ""
) -> list[EvaluationRecord]:
    """Read all that was ever measured, by any job, on these samples; each plan and size once, oldest first.

    Evaluations in which a sample failed are left out: it may not fail again.
    """
    query = (
        select(EvaluationRow)
        .filter_by(model_id=model_id, task_id=task_id, split_hash=split_hash, settings=settings)
        .where(EvaluationRow.failure.is_(None), EvaluationRow.reused_from.is_(None))
        .order_by(EvaluationRow.id)
    )
    first: dict[tuple[str, str, int], EvaluationRecord] = {}
    for row in session.scalars(query):
        name = (row.plan, row.compensation, row.n_samples)
        if name not in first:
            found = _record(row)
            if not any(map(math.isnan, found.scores)):
                first[name] = found
    return list(first.values())
