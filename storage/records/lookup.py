"""Find and register models, tasks and devices: by content, by id, or by what a person types."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from sqlalchemy import ScalarSelect, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage import upsert
from storage.database import reads, writes
from storage.errors import NotFound
from storage.records.described import described
from storage.schema import DeviceRow, ModelNameRow, ModelRow, TaskRow
from storage.types import database_now

SHORTEST_FINGERPRINT = 6


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model: its identity is the fingerprint of its files, the name is for people."""

    name: str = described("The path or hub id it was last loaded under", min_length=1, max_length=1024)
    fingerprint: str = described("SHA-256 of whatever in its files changes an answer", pattern=r"^[0-9a-f]{6,128}$")
    family: str = described(min_length=1, max_length=1024)
    num_layers: int = described("Decoder layers", ge=1)
    parameters: int = described(ge=0)


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """A task: its data (with prompt and metric) by their hash, and the sizes of its splits in samples."""

    name: str = described(min_length=1, max_length=1024)
    task_hash: str = described("Of the samples, prompt, metric and splits", min_length=1, max_length=1024)
    data_hash: str = described("Of the samples that the source gives; empty: not known", default="", max_length=1024)
    definition_hash: str = described("Of prompt, answer and metrics; empty: not known", default="", max_length=1024)
    split_seed: int
    calibration_size: int = described(ge=0)
    search_size: int = described(ge=0)
    held_out_size: int = described(ge=0)


_TASK = tuple(each.name for each in fields(TaskRecord))
_TASK_KEY = ("name", "task_hash", "split_seed", "calibration_size", "search_size", "held_out_size")


@writes
def ensure_model(session: Session, model: ModelRecord, revision: str | None = None) -> int:
    """Return the id of the model of this fingerprint, noting that it was now loaded as ``model.name``."""
    values = asdict(model)
    name = trimmed(values.pop("name"))
    upsert.insert_or_keep(session, ModelRow, [values], [ModelRow.fingerprint])
    model_id = session.execute(select(ModelRow.id).where(ModelRow.fingerprint == model.fingerprint)).scalar_one()
    upsert.insert_or_replace(
        session,
        ModelNameRow,
        [{"model_id": model_id, "name": name, "revision": revision or "", "short_name": short_name(name)}],
        [ModelNameRow.model_id, ModelNameRow.name, ModelNameRow.revision],
        also={"seen_at": database_now()},
    )
    return model_id


@writes
def ensure_task(session: Session, task: TaskRecord, *, used: bool = True) -> int:
    """Return the id of the task, noting that it was now ``used``; one that is imported was not."""
    values = asdict(task)
    key = [getattr(TaskRow, column) for column in _TASK_KEY]
    if used:
        upsert.insert_or_replace(session, TaskRow, [values], key, also={"seen_at": database_now()})
    else:
        upsert.insert_or_keep(session, TaskRow, [values | {"seen_at": None}], key)
    return session.execute(select(TaskRow.id).filter_by(**{name: values[name] for name in _TASK_KEY})).scalar_one()


@writes
def ensure_device(session: Session, name: str) -> int:
    """Return the id of the device of this name."""
    upsert.insert_or_keep(session, DeviceRow, [{"name": name}], [DeviceRow.name])
    return session.execute(select(DeviceRow.id).where(DeviceRow.name == name)).scalar_one()


def trimmed(name: str) -> str:
    """Take the slash off that people leave at the end of a path."""
    return name.rstrip("/") or name


def short_name(name: str) -> str:
    """Return the last part of a path or hub id."""
    return PurePath(name).name or name


def latest_name(model_id: InstrumentedAttribute[Any]) -> ScalarSelect[str]:
    """Select the name that the model of a query's column was last loaded under."""
    return (
        select(ModelNameRow.name)
        .where(ModelNameRow.model_id == model_id)
        .order_by(ModelNameRow.seen_at.desc(), ModelNameRow.id.desc())
        .limit(1)
        .scalar_subquery()
    )


@reads
def model(session: Session, model_id: int) -> ModelRecord:
    """Read the model of this id. Raises ``NotFound``."""
    found = session.execute(select(ModelRow, latest_name(ModelRow.id)).where(ModelRow.id == model_id)).one_or_none()
    if found is None:
        raise NotFound(f"there is no model {model_id}")
    return ModelRecord(**model_values(*found))


def model_values(row: ModelRow, name: str | None) -> dict[str, Any]:
    """Return the fields of a ``ModelRecord``; a model without a name goes by its fingerprint."""
    own = {each.name: getattr(row, each.name) for each in fields(ModelRecord) if each.name != "name"}
    return own | {"name": name or row.fingerprint}


@reads
def task(session: Session, task_id: int) -> TaskRecord:
    """Read the task of this id. Raises ``NotFound``."""
    row = session.get(TaskRow, task_id)
    if row is None:
        raise NotFound(f"there is no task {task_id}")
    return TaskRecord(**task_values(row))


def task_values(row: TaskRow) -> dict[str, Any]:
    """Return the fields of a ``TaskRecord``."""
    return {name: getattr(row, name) for name in _TASK}


@reads
def find_model(session: Session, model: str, revision: str | None = None) -> int:
    """Return the model of that name or fingerprint (or an unambiguous beginning of one).

    A name may have stood for several models over time; the one last loaded under it is meant. Raises ``NotFound``.
    """
    wanted = trimmed(model)
    for column in (ModelNameRow.name, ModelNameRow.short_name):
        query = select(ModelNameRow.model_id).where(column == wanted)
        if revision is not None:
            query = query.where(ModelNameRow.revision == revision)
        latest = query.order_by(ModelNameRow.seen_at.desc(), ModelNameRow.id.desc()).limit(1)
        found = session.scalars(latest).one_or_none()
        if found is not None:
            return found
    if len(model) >= SHORTEST_FINGERPRINT:
        prefixed = ModelRow.fingerprint.startswith(model, autoescape=True)
        ids = session.scalars(select(ModelRow.id).where(prefixed).limit(2)).all()
        if len(ids) == 1:
            return ids[0]
    names = select(ModelNameRow.name).union(select(ModelNameRow.short_name)).limit(10_000)
    known = session.scalars(names).all()
    at = f" at revision {revision}" if revision else ""
    raise NotFound(f"no model {model!r}{at} in the database; {_suggest(model, known)}")


@reads
def find_tasks(session: Session, task: str) -> list[int]:
    """Return the tasks of that name: one for each version of its data and its splits. Raises ``NotFound``."""
    ids = session.scalars(select(TaskRow.id).where(TaskRow.name == task).order_by(TaskRow.id)).all()
    if not ids:
        known = session.scalars(select(TaskRow.name).distinct().limit(10_000)).all()
        raise NotFound(f"no task {task!r} in the database; {_suggest(task, known)}")
    return list(ids)


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A model by its fingerprint, with the name that it was last loaded under."""

    id: int
    fingerprint: str
    name: str


@dataclass(frozen=True, kw_only=True)
class TaskVersion(TaskRecord):
    """A task with its id."""

    id: int


@reads
def model_versions(session: Session) -> list[ModelVersion]:
    """List every model under each name that it was loaded under, the one last loaded first."""
    query = (
        select(ModelRow.id, ModelRow.fingerprint, ModelNameRow.name)
        .join(ModelNameRow, ModelNameRow.model_id == ModelRow.id)
        .order_by(ModelNameRow.seen_at.desc(), ModelNameRow.id.desc())
    )
    return [ModelVersion(**row._mapping) for row in session.execute(query)]


@reads
def task_versions(session: Session) -> list[TaskVersion]:
    """List every version of every task, the one last used first."""
    rows = session.scalars(select(TaskRow).order_by(TaskRow.seen_at.desc().nulls_last(), TaskRow.id.desc()))
    return [TaskVersion(id=row.id, **task_values(row)) for row in rows]


@reads
def find_devices(session: Session, device: str) -> list[int]:
    """Return the device of that name, or else all devices with that text in their name. Raises ``NotFound``."""
    ids = session.scalars(select(DeviceRow.id).where(DeviceRow.name == device)).all()
    if not ids:
        containing = func.lower(DeviceRow.name).contains(device.lower(), autoescape=True)
        ids = session.scalars(select(DeviceRow.id).where(containing).order_by(DeviceRow.id)).all()
    if not ids:
        known = session.scalars(select(DeviceRow.name).limit(10_000)).all()
        raise NotFound(f"no device {device!r} in the database; {_suggest(device, known)}")
    return list(ids)


def _suggest(wanted: str, known: Iterable[str]) -> str:
    names = sorted(known)
    if not names:
        return "there are none yet"
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"there are {shown}"
