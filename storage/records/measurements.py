"""Keep what was measured about models once for all jobs: latency of the layers, and their redundancy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

from sqlalchemy import case, or_, select, true
from sqlalchemy.orm import Session

from storage import upsert
from storage.database import reads, writes
from storage.queue import leases
from storage.queue.jobs import Job
from storage.records import lookup
from storage.schema import DeviceRow, JobRow, LatencyProfileRow, RedundancyRow
from storage.types import database_now


@dataclass(frozen=True, kw_only=True)
class ProfileRecord:
    """Seconds of a request under a workload: dense, and every layer under every action (``layer_seconds["R"][3]``)."""

    model_id: int
    task_id: int
    device: str
    workload: str
    prompt_tokens: int
    dense_latency_seconds: float
    layer_seconds: dict[str, tuple[float, ...]]
    relative_error: float
    phases: dict[str, Any] = field(default_factory=dict)
    """The same per phase, for the prefill and each token after it: ``phases["prefill"]["R"][3]``."""
    measured_at: datetime | None = None


@dataclass(frozen=True)
class Redundancy:
    """One statistic of one layer over one group of tokens (``"vision"``, ``"text"``, ``"all"``)."""

    layer: int
    token_group: str
    name: str
    value: float
    standard_error: float | None
    n: int


@writes
def record_profile(session: Session, job: Job, profile: ProfileRecord) -> None:
    """Persist a latency profile; measured again by the same job, it takes the old one's place. Raises ``LeaseLost``."""
    leases.hold(session, job)
    values = asdict(profile)
    del values["measured_at"]
    values |= {"job_id": job.id, "device_id": lookup.ensure_device(session, values.pop("device"))}
    key = [getattr(LatencyProfileRow, name) for name in ("job_id", "model_id", "task_id", "device_id", "workload")]
    upsert.insert_or_replace(session, LatencyProfileRow, [values], key, also={"measured_at": database_now()})


@reads
def profile_of_job(session: Session, job_id: int) -> ProfileRecord | None:
    """Read the latency profile that a job measured, the last one; ``None`` when there is none."""
    query = (
        select(LatencyProfileRow, DeviceRow.name)
        .join(DeviceRow, DeviceRow.id == LatencyProfileRow.device_id)
        .where(LatencyProfileRow.job_id == job_id)
        .order_by(LatencyProfileRow.id.desc())
        .limit(1)
    )
    found = session.execute(query).one_or_none()
    if found is None:
        return None
    row, device = found
    values = {each.name: getattr(row, each.name) for each in fields(ProfileRecord) if each.name != "device"}
    values["layer_seconds"] = {action: tuple(seconds) for action, seconds in row.layer_seconds.items()}
    return ProfileRecord(**values, device=device)


@writes
def record_redundancy(
    session: Session,
    job: Job,
    *,
    model_id: int,
    task_id: int,
    calibration_hash: str,
    measurements: Iterable[Redundancy],
) -> None:
    """Persist redundancy statistics; those measured again take the old ones' place. Raises ``LeaseLost``."""
    leases.hold(session, job)
    of = {"model_id": model_id, "task_id": task_id, "calibration_hash": calibration_hash}
    key = [getattr(RedundancyRow, name) for name in (*of, "name", "token_group", "layer")]
    rows = [of | {"job_id": job.id} | asdict(each) for each in measurements]
    upsert.insert_or_replace(session, RedundancyRow, rows, key, also={"measured_at": database_now()})


@reads
def redundancy(
    session: Session, *, model_id: int, task_id: int, calibration_hash: str, names: Sequence[str] = ()
) -> list[Redundancy]:
    """Read the statistics of a model on these calibration samples, by name, token group and layer."""
    query = select(RedundancyRow).filter_by(model_id=model_id, task_id=task_id, calibration_hash=calibration_hash)
    if names:
        query = query.where(RedundancyRow.name.in_(names))
    query = query.order_by(RedundancyRow.name, RedundancyRow.token_group, RedundancyRow.layer)
    return [
        Redundancy(**{each.name: getattr(row, each.name) for each in fields(Redundancy)})
        for row in session.scalars(query)
    ]


@reads
def redundancy_of_job(session: Session, job_id: int, model_id: int, task_id: int) -> list[Redundancy]:
    """Read statistics of a job's model and task, by name, token group and layer; bookkeeping rows are left out.

    Statistics are shared between jobs, and which ones a job used is not stored: those that it wrote, or else the last
    ones that were there when it ended, which may be of another dtype, device or version.
    """
    ended = session.scalar(select(JobRow.finished_at).filter_by(id=job_id))
    there = RedundancyRow.job_id == job_id
    chosen = session.scalar(
        select(RedundancyRow.calibration_hash)
        .filter_by(model_id=model_id, task_id=task_id)
        .where(true() if ended is None else or_(there, RedundancyRow.measured_at <= ended))
        .order_by(case((there, 0), else_=1), RedundancyRow.id.desc())
        .limit(1)
    )
    if chosen is None:
        return []
    found = redundancy(session, model_id=model_id, task_id=task_id, calibration_hash=chosen)
    return [each for each in found if each.name != "measured"]
