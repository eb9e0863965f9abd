"""Read a job file: YAML, environment variables and paths become a :class:`JobSpec`, mistakes become one line.

Unknown keys, wrong types and impossible values end in one :class:`UsageFault` line that names the field by its dotted
path and says what would be right. Environment variables that override fields are listed in ``ENVIRONMENT``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from optimizer.errors import UsageFault
from optimizer.job.spec import DEFAULT_DATABASE, JobSpec
from workers.tasks.spec import HARNESS
from workers.validation import explain, load_yaml

if TYPE_CHECKING:
    from storage.queue.jobs import Job

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "SKIPPLAN_DATABASE": ("database",),
    "SKIPPLAN_ARTIFACTS": ("artifacts",),
    "SKIPPLAN_CLUSTER_ADDRESS": ("cluster", "address"),
    "SKIPPLAN_CLUSTER_WORKERS": ("cluster", "workers"),
    "SKIPPLAN_CLUSTER_CPUS_PER_WORKER": ("cluster", "cpus_per_worker"),
    "SKIPPLAN_CLUSTER_GPUS_PER_WORKER": ("cluster", "gpus_per_worker"),
    "SKIPPLAN_CLUSTER_MEMORY_PER_WORKER": ("cluster", "memory_per_worker"),
    "SKIPPLAN_DEVICE": ("model", "device"),
}
"""Environment variables and the fields they override (the variable wins over the job file)."""

FORMER = {
    "latency_precision": "latency.precision",
    "latency_seconds": "latency.max_seconds",
    "search.evaluations": "search.trials",
    "search.latency": "search.latency_model (profile or layers)",
}
"""Fields that job files had under another name, and what they are called now."""


def load_job(
    path: Path,
    *,
    database: str | None = None,
    strategy: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> JobSpec:
    """Read a job file; ``database`` and ``strategy`` (options) win over the environment, which wins over the file.

    Raises UsageFault naming the file and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise UsageFault(f"{path}: is a directory; a job file (YAML) is needed") from None
    except FileNotFoundError:
        raise UsageFault(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageFault(f"{path}: cannot be read as UTF-8 text ({error})") from None
    document = parse_yaml(text, str(path))
    override(document, os.environ if environment is None else environment)
    if database:
        document["database"] = database
    if strategy:
        section = document.setdefault("search", {})
        if isinstance(section, dict):
            section["strategy"] = strategy
    return resolve_paths(validate_job(document, str(path)), path.resolve().parent)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Read a YAML mapping safely (no Python objects, no repeated keys). Raises UsageFault naming the line."""
    try:
        document = load_yaml(text, source)
    except ValueError as error:
        raise UsageFault(str(error)) from None
    if not isinstance(document, dict):
        raise UsageFault(f"{source}: a job file is a mapping of fields such as 'model:' and 'task:'")
    return document


def validate_job(document: dict[str, Any], source: str) -> JobSpec:
    """Check a job's fields. Raises UsageFault with one line about the first problem."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        if "source" in document and "model" not in document:
            raise UsageFault(
                f"{source}: is a task file, not a job file; skipplan init --model MODEL --task {source} writes a job "
                "file for it"
            ) from None
        unknown = {".".join(map(str, each["loc"])) for each in error.errors() if each["type"] == "extra_forbidden"}
        if former := [name for name in FORMER if name in unknown]:
            now = ", ".join(f"{name} is {FORMER[name]} now" for name in former)
            raise UsageFault(f"{source}: {former[0]}: unknown field; {now}") from None
        raise UsageFault(f"{source}: {explain(error, JobSpec)}") from None


def read_spec(job: Job) -> JobSpec:
    """Read a stored job's specification, on the cluster that this process's environment names, if it does.

    Raises UsageFault naming the field when this version cannot read it.
    """
    document = {**job.spec, "database": DEFAULT_DATABASE, "cluster": dict(job.spec.get("cluster") or {})}
    try:
        validate_job(document, f"job {job.id}")
    except UsageFault as fault:
        raise UsageFault(
            f"{fault} (another version of skipplan stored this job; submit its job file again, without that)"
        ) from None
    override(document, os.environ, section="cluster")
    return validate_job(document, f"job {job.id}")


def unreadable(job: Job) -> str:
    """Say why a job that may go on cannot be run by this version; empty where it can, or has its result."""
    if job.state in ("succeeded", "infeasible"):
        return ""
    try:
        read_spec(job)
    except UsageFault as fault:
        return str(fault)
    return ""


def override(document: dict[str, Any], environment: Mapping[str, str], section: str | None = None) -> None:
    """Let environment variables win over a document's fields (only over those of one section, if it is given)."""
    for variable, field in ENVIRONMENT.items():
        value: Any = environment.get(variable)
        if not value or (section is not None and field[0] != section):
            continue
        target: Any = document
        for key in field[:-1]:
            target = target.setdefault(key, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[field[-1]] = int(value) if value.isdigit() else value


def resolve_paths(spec: JobSpec, base: Path) -> JobSpec:
    """Make the model and task paths absolute where they name files beside the job file.

    A plain name (``llava-12``, ``org/model``) stays a name unless such a file or directory exists. The directory of
    artifacts is, like a database file, relative to where the command runs.
    """
    model = resolve_name(spec.model.path, base)
    task = None if spec.task is None else resolve_name(spec.task, base)
    tasks = tuple(goal.model_copy(update={"task": resolve_name(goal.task, base)}) for goal in spec.tasks)
    artifacts = spec.artifacts if "://" in spec.artifacts else str(Path(spec.artifacts).expanduser().resolve())
    own_model = spec.model.model_copy(update={"path": model})
    others = tuple(resolve_name(name, base) for name in spec.collateral.tasks)
    text = None if spec.collateral.text is None else str((base / Path(spec.collateral.text).expanduser()).resolve())
    collateral = spec.collateral.model_copy(update={"tasks": others, "text": text})
    mixed = spec.compensation.text
    general = None if mixed is None else str((base / Path(mixed).expanduser()).resolve())
    compensation = spec.compensation.model_copy(update={"text": general})
    changed = {
        "model": own_model,
        "task": task,
        "tasks": tasks,
        "artifacts": artifacts,
        "collateral": collateral,
        "compensation": compensation,
    }
    return spec.model_copy(update=changed)


def resolve_name(name: str, base: Path) -> str:
    """Make a path relative to ``base`` absolute; a name that no file there has stays as it is.

    Of ``lmms-eval:DIRECTORY/NAME`` the directory is the path.
    """
    if name.startswith(f"{HARNESS}:") and "/" in name:
        directory, _, task = name.removeprefix(f"{HARNESS}:").rpartition("/")
        return f"{HARNESS}:{(base / Path(directory).expanduser()).resolve()}/{task}"
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")):
        return str((base / path).resolve())
    return str((base / path).resolve()) if (base / path).exists() else name
