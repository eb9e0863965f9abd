"""What identifies a stored model, task or device: what another database needs to know the same one again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from storage.database import reads
from storage.errors import NotFound
from storage.schema import DeviceRow, ModelRow, TaskRow

Row = TypeVar("Row", ModelRow, TaskRow, DeviceRow)


@dataclass(frozen=True)
class ModelIdentity:
    """A model, by the fingerprint of its configuration and weights."""

    fingerprint: str
    family: str
    num_layers: int
    parameters: int


@dataclass(frozen=True)
class TaskIdentity:
    """A task, by the hash of its data and how they were split."""

    name: str
    data_hash: str
    split_seed: int
    calibration_size: int
    search_size: int
    held_out_size: int


@dataclass(frozen=True)
class DeviceIdentity:
    """A device, by the name that a worker gave it."""

    name: str
    details: dict[str, Any]


@reads
def model(session: Session, model_id: int) -> ModelIdentity:
    """The model of this id. Raises ``NotFound``."""
    row = _get(session, ModelRow, model_id, "model")
    return ModelIdentity(row.fingerprint, row.family, row.num_layers, row.parameters)


@reads
def task(session: Session, task_id: int) -> TaskIdentity:
    """The task of this id. Raises ``NotFound``."""
    row = _get(session, TaskRow, task_id, "task")
    return TaskIdentity(
        name=row.name,
        data_hash=row.data_hash,
        split_seed=row.split_seed,
        calibration_size=row.calibration_size,
        search_size=row.search_size,
        held_out_size=row.held_out_size,
    )


@reads
def device(session: Session, device_id: int) -> DeviceIdentity:
    """The device of this id. Raises ``NotFound``."""
    row = _get(session, DeviceRow, device_id, "device")
    return DeviceIdentity(row.name, dict(row.details))


def _get(session: Session, table: type[Row], row_id: int, kind: str) -> Row:
    row = session.get(table, row_id)
    if row is None:
        raise NotFound(f"there is no {kind} {row_id}")
    return row
