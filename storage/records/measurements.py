"""Models, tasks and devices, and what was measured about them once for all jobs: latency and redundancy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import upsert
from storage.database import reads, writes
from storage.queue import jobs
from storage.queue.jobs import Job
from storage.schema import DeviceRow, LatencyProfileRow, ModelNameRow, ModelRow, RedundancyRow, TaskRow
from storage.types import database_now


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds of a request under a workload: dense, and every layer under every action (``layer_seconds["R"][3]``)."""

    model_id: int
    task_id: int
    device_id: int
    workload: str
    prompt_tokens: int
    dense_seconds: float
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
def ensure_model(
    session: Session,
    *,
    name: str,
    fingerprint: str,
    family: str,
    num_layers: int,
    parameters: int,
    revision: str | None = None,
) -> int:
    """The id of the model of this fingerprint, noting that it was now loaded as ``name`` (a path or hub id)."""
    name = trimmed(name)
    values = {"fingerprint": fingerprint, "family": family, "num_layers": num_layers, "parameters": parameters}
    upsert.insert_or_keep(session, ModelRow, [values], [ModelRow.fingerprint])
    model_id = session.execute(select(ModelRow.id).where(ModelRow.fingerprint == fingerprint)).scalar_one()
    upsert.insert_or_replace(
        session,
        ModelNameRow,
        [{"model_id": model_id, "name": name, "revision": revision or "", "short_name": short_name(name)}],
        [ModelNameRow.model_id, ModelNameRow.name, ModelNameRow.revision],
        also={"seen_at": database_now()},
    )
    return model_id


def trimmed(name: str) -> str:
    """A path without the slash that people leave at its end."""
    return name.rstrip("/") or name


def short_name(name: str) -> str:
    """The last part of a path or hub id."""
    return PurePath(name).name or name


@writes
def ensure_task(
    session: Session,
    *,
    name: str,
    data_hash: str,
    split_seed: int,
    calibration_size: int,
    search_size: int,
    held_out_size: int,
) -> int:
    """The id of the task; ``data_hash`` covers the samples and whatever else changes a score (prompt, metric)."""
    values = {
        "name": name,
        "data_hash": data_hash,
        "split_seed": split_seed,
        "calibration_size": calibration_size,
        "search_size": search_size,
        "held_out_size": held_out_size,
    }
    key = [getattr(TaskRow, column) for column in values]
    upsert.insert_or_keep(session, TaskRow, [values], key)
    return session.execute(select(TaskRow.id).filter_by(**values)).scalar_one()


@writes
def ensure_device(session: Session, *, name: str, details: Mapping[str, Any] | None = None) -> int:
    """The id of the device of this name."""
    upsert.insert_or_keep(session, DeviceRow, [{"name": name, "details": dict(details or {})}], [DeviceRow.name])
    return session.execute(select(DeviceRow.id).where(DeviceRow.name == name)).scalar_one()


@writes
def record_latency(session: Session, job: Job, profile: LatencyProfile) -> None:
    """Persist a latency profile; measured again by the same job, it takes the old one's place. Raises ``LeaseLost``."""
    jobs.hold(session, job)
    values = {
        "job_id": job.id,
        "model_id": profile.model_id,
        "task_id": profile.task_id,
        "device_id": profile.device_id,
        "workload": profile.workload,
        "prompt_tokens": profile.prompt_tokens,
        "dense_seconds": profile.dense_seconds,
        "layer_seconds": {action: list(seconds) for action, seconds in profile.layer_seconds.items()},
        "relative_error": profile.relative_error,
        "phases": profile.phases,
    }
    key = [getattr(LatencyProfileRow, name) for name in ("job_id", "model_id", "task_id", "device_id", "workload")]
    upsert.insert_or_replace(session, LatencyProfileRow, [values], key, also={"measured_at": database_now()})


@reads
def latest_latency(
    session: Session, *, model_id: int, task_id: int, device_id: int, workload: str, job_id: int | None = None
) -> LatencyProfile | None:
    """The latest latency profile (of one job), or ``None``."""
    query = select(LatencyProfileRow).where(
        LatencyProfileRow.model_id == model_id,
        LatencyProfileRow.task_id == task_id,
        LatencyProfileRow.device_id == device_id,
        LatencyProfileRow.workload == workload,
    )
    if job_id is not None:
        query = query.where(LatencyProfileRow.job_id == job_id)
    row = session.scalars(query.order_by(LatencyProfileRow.id.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    return LatencyProfile(
        model_id=row.model_id,
        task_id=row.task_id,
        device_id=row.device_id,
        workload=row.workload,
        prompt_tokens=row.prompt_tokens,
        dense_seconds=row.dense_seconds,
        layer_seconds={action: tuple(seconds) for action, seconds in row.layer_seconds.items()},
        relative_error=row.relative_error,
        phases=dict(row.phases),
        measured_at=row.measured_at,
    )


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
    jobs.hold(session, job)
    key = [
        RedundancyRow.model_id,
        RedundancyRow.task_id,
        RedundancyRow.calibration_hash,
        RedundancyRow.name,
        RedundancyRow.token_group,
        RedundancyRow.layer,
    ]
    rows = [
        {
            "model_id": model_id,
            "task_id": task_id,
            "job_id": job.id,
            "calibration_hash": calibration_hash,
            "name": each.name,
            "token_group": each.token_group,
            "layer": each.layer,
            "value": each.value,
            "standard_error": each.standard_error,
            "n": each.n,
        }
        for each in measurements
    ]
    upsert.insert_or_replace(session, RedundancyRow, rows, key, also={"measured_at": database_now()})


@reads
def redundancy(
    session: Session, *, model_id: int, task_id: int, calibration_hash: str, names: Sequence[str] = ()
) -> list[Redundancy]:
    """The statistics of a model on these calibration samples, by name, token group and layer."""
    query = select(RedundancyRow).where(
        RedundancyRow.model_id == model_id,
        RedundancyRow.task_id == task_id,
        RedundancyRow.calibration_hash == calibration_hash,
    )
    if names:
        query = query.where(RedundancyRow.name.in_(names))
    query = query.order_by(RedundancyRow.name, RedundancyRow.token_group, RedundancyRow.layer)
    return [
        Redundancy(row.layer, row.token_group, row.name, row.value, row.standard_error, row.n)
        for row in session.scalars(query)
    ]
