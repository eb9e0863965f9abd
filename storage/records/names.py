"""From what a person types to rows: models by path, hub id, last part of it or fingerprint; tasks and devices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage.database import reads
from storage.errors import NotFound
from storage.records.measurements import trimmed
from storage.schema import DeviceRow, ModelNameRow, ModelRow, TaskRow

SHORTEST_FINGERPRINT = 6


@reads
def find_model(session: Session, model: str, revision: str | None = None) -> int:
    """The model of that name or fingerprint (or an unambiguous beginning of one).

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
    """The tasks of that name: one for each version of its data and its splits. Raises ``NotFound``."""
    ids = session.scalars(select(TaskRow.id).where(TaskRow.name == task).order_by(TaskRow.id)).all()
    if not ids:
        known = session.scalars(select(TaskRow.name).distinct().limit(10_000)).all()
        raise NotFound(f"no task {task!r} in the database; {_suggest(task, known)}")
    return list(ids)


@reads
def find_devices(session: Session, device: str) -> list[int]:
    """The device of that name, or else all devices with that text in their name. Raises ``NotFound``."""
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
