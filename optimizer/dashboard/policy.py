"""Check jobs that come over the network: no files but those laid out for them, nothing of the service's own.

Fields are refused unless they stand in a list here: a new field of job files is nothing that a stranger may set before
somebody has thought about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimizer.errors import UsageFault
from optimizer.job.loading import override, validate_job
from optimizer.job.spec import JobSpec
from workers.models.checkpoint import BUILT_MODELS, bundled_models
from workers.tasks import bundled_tasks

OF_THE_SERVICE = {"database", "artifacts"}
"""Fields that no request may set: where the service keeps what it has."""

FOR_ADMINS = {"cluster", "notify"}
"""Fields that lead to other machines, or decide how much of this one a job takes; and any that is in no list."""

FOR_ALL = {
    "mode", "model", "task", "tasks", "actions", "criterion", "thresholds", "redundancy_samples", "constraint",
    "protect", "search", "compensation", "collateral", "guard", "splits", "workload", "latency", "evaluation",
    "max_failed_samples", "priority", "attempts", "tracking",
}  # fmt: skip

MODEL_FOR_ALL = {"path", "revision", "dtype", "device", "attention"}
RUNS_CODE = {"trust_remote_code", "allow_pickle"}
HIGHEST_PRIORITY = 0
"""Of jobs that no admin submitted."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95}){0,4}", re.ASCII)


def read_job(document: Mapping[str, Any], *, is_admin: bool, files: Path | None) -> JobSpec:
    """Read a job's fields as they came over the network; ``files`` is the only directory that they may name files of.

    Raises UsageFault naming the field, as for a job file, or saying why it is refused.
    """
    job = {name: dict(value) if isinstance(value, dict) else value for name, value in document.items()}
    _refuse_fields(job, is_admin=is_admin)
    override(job, {name: value for name, value in os.environ.items() if name != "SKIPPLAN_DATABASE"})
    spec = validate_job(job, "job")
    if spec.priority > HIGHEST_PRIORITY and not is_admin:
        raise UsageFault(f"priority: above {HIGHEST_PRIORITY} takes a token of the role admin")
    revision = spec.model.revision
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageFault(f"model.revision: {revision[:100]!r} is no name of a revision")
    return _located(spec, files)


def _refuse_fields(job: dict[str, Any], *, is_admin: bool) -> None:
    for name in sorted(job.keys() & OF_THE_SERVICE):
        raise UsageFault(f"{name}: belongs to the service; leave it out")
    if is_admin:
        return
    for name in sorted(job.keys() & (JobSpec.model_fields.keys() - FOR_ALL)):
        raise UsageFault(f"{name}: takes a token of the role admin; leave it out")
    model = job.get("model")
    for name in sorted(model.keys() - MODEL_FOR_ALL) if isinstance(model, dict) else ():
        if name in RUNS_CODE:
            raise UsageFault(f"model.{name}: takes a token of the role admin; leave it out")


def _located(spec: JobSpec, files: Path | None) -> JobSpec:
    """Replace the names of files by their places. Raises UsageFault for one that is not laid out."""
    model = spec.model.model_copy(update={"path": _model(spec.model.path, files)})
    tasks = tuple(_task("collateral.tasks", name, files) for name in spec.collateral.tasks)
    texts = {
        section: None if name is None else _require_file(f"{section}.text", name, files)
        for section, name in (("collateral", spec.collateral.text), ("compensation", spec.compensation.text))
    }
    changed = {
        "model": model,
        "task": None if spec.task is None else _task("task", spec.task, files),
        "tasks": tuple(each.model_copy(update={"task": _task("tasks", each.task, files)}) for each in spec.tasks),
        "collateral": spec.collateral.model_copy(update={"tasks": tasks, "text": texts["collateral"]}),
        "compensation": spec.compensation.model_copy(update={"text": texts["compensation"]}),
        "artifacts": spec.artifacts if "://" in spec.artifacts else str(Path(spec.artifacts).expanduser().resolve()),
    }
    return spec.model_copy(update=changed)


def _model(name: str, files: Path | None) -> str:
    if (found := _find(name, files)) is not None:
        return found
    known = name in bundled_models() or name in BUILT_MODELS
    # A directory of that name here would be taken in the place of the hub's model, by whoever runs the job.
    if (known or _HUB_ID.fullmatch(name)) and not _is_here(name):
        return name
    raise UsageFault(
        f"model.path: {name[:100]!r} is neither a bundled model ({', '.join(bundled_models())}), a hub id, nor in the "
        "directory that the service lays out (dashboard --files)"
    )


def _task(field: str, name: str, files: Path | None) -> str:
    if name in bundled_tasks() and not _is_here(name):
        return name
    found = _find(name, files)
    if found is None:
        raise UsageFault(
            f"{field}: {name[:100]!r} is neither a bundled task ({', '.join(bundled_tasks())}) nor in the directory "
            "that the service lays out (dashboard --files)"
        )
    return found


def _require_file(field: str, name: str, files: Path | None) -> str:
    found = _find(name, files)
    if found is None:
        raise UsageFault(
            f"{field}: {name[:100]!r} is not in the directory that the service lays out (dashboard --files)"
        )
    return found


def _find(name: str, files: Path | None) -> str | None:
    """Return the place of what ``name`` says inside ``files``, links followed; None where it is not inside or there."""
    if files is None:
        return None
    try:
        base = files.resolve()
        place = (base / name).resolve()
        inside = place != base and place.is_relative_to(base) and place.exists()
    except (OSError, ValueError, RuntimeError):  # too long, NUL characters, circles of links
        return None
    return str(place) if inside else None


def _is_here(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return True
