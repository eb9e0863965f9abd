"""Writing a published plan for other deployments: a registry of formats, each one function.

An export appears whole or not at all: it is written beside its destination and moved there in one step.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optimizer.errors import UsageFault
from optimizer.results import plan_json
from storage.plans import Plan
from workers.messages import ModelSource
from workers.runtime import Action, SkipPlan

SCHEMA_VERSION = 1
DESCRIPTION_FILE = "skipplan.json"


@dataclass(frozen=True)
class Format:
    """A kind of export: the actions it can express and what writes it into an empty directory."""

    name: str
    actions: frozenset[Action]
    write: Callable[[Plan, ModelSource, Path], None]


def export_plan(plan: Plan, model: ModelSource, format_name: str, output: Path, *, force: bool = False) -> Path:
    """Write ``plan`` to the directory ``output`` and return it.

    Raises UsageFault for an unknown format, a plan that the format cannot express, a model that is not the one the
    plan was measured on, or a directory that exists (unless ``force``).
    """
    chosen = FORMATS.get(format_name)
    if chosen is None:
        raise UsageFault(f"--format: {format_name!r} is unknown; choose one of {', '.join(FORMATS)}")
    letters = set(SkipPlan.parse(plan.plan))
    missing = sorted(action.name.lower() for action in letters - chosen.actions)
    if missing:
        able = [each.name for each in FORMATS.values() if letters <= each.actions]
        raise UsageFault(
            f"plan {plan.id} ({plan.plan}): format {chosen.name} cannot express {', '.join(missing)}; "
            f"formats that can: {', '.join(able)}"
        )
    with _whole_directory(output, force) as directory:
        chosen.write(plan, model, directory)
        (directory / DESCRIPTION_FILE).write_text(json.dumps(describe_export(plan, chosen.name), indent=2) + "\n")
    return output


def describe_export(plan: Plan, format_name: str) -> dict[str, Any]:
    """What stands in ``skipplan.json``: the plan, the model it belongs to, and its verified figures."""
    figures = plan_json(plan)
    identity = {key: figures.pop(key) for key in ("plan", "layers", "compensation", "model", "fingerprint", "task")}
    return {
        "schema_version": SCHEMA_VERSION,
        "format": format_name,
        **identity,
        "figures": figures,
        "versions": {name: _version(name) for name in ("skipplan", "torch", "transformers")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def _whole_directory(output: Path, force: bool) -> Iterator[Path]:
    """A fresh directory that takes the place of ``output`` when the block ends well, and vanishes otherwise."""
    output = output.absolute()
    if output.exists() and not force and (not output.is_dir() or any(output.iterdir())):
        raise UsageFault(f"--output: {output} exists; give another directory, or --force to replace it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UsageFault(f"--output: {output} cannot be written: {error.strerror}") from None
    try:
        fresh = staging / "new"
        fresh.mkdir()
        yield fresh
        if output.exists():
            output.replace(staging / "old")
        fresh.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_plan(plan: Plan, model: ModelSource, directory: Path) -> None:
    (directory / "plan.json").write_text(SkipPlan.parse(plan.plan).to_json() + "\n")


def _write_checkpoint(plan: Plan, model: ModelSource, directory: Path) -> None:
    from workers.checkpoints import check_checkpoint, find_checkpoint, fingerprint_checkpoint
    from workers.models import load_model
    from workers.runtime import save_pruned

    source = find_checkpoint(model)
    check_checkpoint(source)
    fingerprint = fingerprint_checkpoint(source)
    if fingerprint != plan.fingerprint:
        raise UsageFault(
            f"model {model.path} is not the one that plan {plan.id} was measured on: its fingerprint is "
            f"{fingerprint[:12]}, the plan's {plan.fingerprint[:12]}; name the right one with --model-path"
        )
    loaded = load_model(model, device="cpu")
    save_pruned(loaded.model, SkipPlan.parse(plan.plan), directory, processor=loaded.processor)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format("plan", frozenset(Action), _write_plan),
        Format("checkpoint", frozenset({Action.RUN, Action.SKIP}), _write_checkpoint),
    )
}
