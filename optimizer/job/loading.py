"""Reading a job file: YAML, environment variables and paths become a :class:`JobSpec`, mistakes become one line.

Unknown keys, wrong types and impossible values end in one :class:`UsageFault` line that names the field by its dotted
path and says what would be right. Environment variables that override fields are listed in ``ENVIRONMENT``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from optimizer.errors import UsageFault
from optimizer.job.spec import JobSpec
from workers.text import one_line

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
        document = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UsageFault(f"{source}:{where} not valid YAML: {problem}") from None
    if not isinstance(document, dict):
        raise UsageFault(f"{source}: a job file is a mapping of fields such as 'model:' and 'task:'")
    return document


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key said twice is an error, not the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing repeated keys."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


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
        problems = error.errors(include_url=False)
        # A misspelt field is reported before the field it left out: it is the likelier mistake.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        raise UsageFault(f"{source}: {_explain(first)}") from None


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
    task = resolve_name(spec.task, base)
    artifacts = spec.artifacts if "://" in spec.artifacts else str(Path(spec.artifacts).expanduser().resolve())
    own_model = spec.model.model_copy(update={"path": model})
    others = tuple(resolve_name(name, base) for name in spec.collateral.tasks)
    text = None if spec.collateral.text is None else str((base / Path(spec.collateral.text).expanduser()).resolve())
    collateral = spec.collateral.model_copy(update={"tasks": others, "text": text})
    changed = {"model": own_model, "task": task, "artifacts": artifacts, "collateral": collateral}
    return spec.model_copy(update=changed)


def resolve_name(name: str, base: Path) -> str:
    """A path relative to ``base`` made absolute; a name that no file there has stays as it is."""
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")):
        return str((base / path).resolve())
    return str((base / path).resolve()) if (base / path).exists() else name


def _explain(problem: ErrorDetails) -> str:
    """One line for a pydantic problem: dotted field, what is wrong, what would be right."""
    location = [part for part in problem["loc"] if part not in ("int", "literal['auto']")]
    field = ".".join(str(part) for part in location) or "job"
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _known_fields(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
        return f"{field}: unknown field; {hint}"
    if kind == "missing":
        return f"{field}: missing; {_describe(location)}"
    if kind == "model_type":
        return f"{field}: must be a mapping with fields such as {', '.join(_known_fields(location)[:3])}, not {given!r}"
    if kind == "literal_error" and isinstance(given, str):
        close = difflib.get_close_matches(given, re.findall(r"'([^']+)'", problem["msg"]), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        return one_line(f"{field}: {_lower(problem['msg'])}, not {given!r}{hint}")
    message = problem["msg"].removeprefix("Value error, ")
    if location == []:
        return one_line(message)
    return one_line(f"{field}: {_lower(message)}, not {given!r}"[:400])


def _lower(message: str) -> str:
    return (message[:1].lower() + message[1:]).replace("input should", "must")


def _known_fields(location: list[int | str]) -> list[str]:
    section = _section(location)
    return list(section.model_fields) if section else []


def _section(location: list[int | str]) -> type[BaseModel] | None:
    section: type[BaseModel] = JobSpec
    for part in location:
        annotation = section.model_fields[str(part)].annotation if str(part) in section.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        section_type = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section_type is None:
            return None
        section = section_type
    return section


def _describe(location: list[int | str]) -> str:
    section = _section(location[:-1])
    field = section.model_fields.get(str(location[-1])) if section else None
    return (field.description if field and field.description else "this field is needed").rstrip(".")
