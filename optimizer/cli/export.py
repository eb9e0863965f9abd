"""``skipplan export``: write a published plan for other deployments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.plans import AsJson, DeviceOption, MaxDrop, MinSpeedup, ModelOption, TaskOption, find_best
from optimizer.cli.state import open_database, print_json, print_line

if TYPE_CHECKING:
    from storage.database import Database
    from storage.plans import Plan
    from workers.messages import ModelSource


FORMAT_NAMES = "plan|checkpoint|runtime|mergekit|llama-cpp|openvino|vllm"
ModelPath = Annotated[
    str | None, typer.Option("--model-path", help="Where the model is now, if not where it was measured.")
]
ForceModel = Annotated[
    bool, typer.Option("--force-model", help="Take a model with another fingerprint than the plan's.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(export)


def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", help="Directory to write.", show_default=False)],
    plan_id: Annotated[int | None, typer.Argument(metavar="[PLAN]", help="Id; or pick one as `best` does.")] = None,
    format_name: Annotated[str, typer.Option("--format", metavar=FORMAT_NAMES, help="What to write.")] = "checkpoint",
    model: ModelOption = None,
    task: TaskOption = None,
    max_accuracy_drop: MaxDrop = None,
    min_speedup: MinSpeedup = None,
    device: DeviceOption = None,
    model_path: ModelPath = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
    force_model: ForceModel = False,
    as_json: AsJson = False,
) -> int:
    """Write a plan for another deployment: as JSON, as a plain Hugging Face checkpoint, or for another runtime.

    [bold]Example:[/bold] skipplan export --model llava-12 --task easy-vqa --output exports/fast
    """
    from optimizer.exports.document import describe
    from optimizer.exports.writing import export_plan
    from storage import identities
    from workers.messages import Artefact

    with open_database(context) as db:
        plan = _chosen(db, plan_id) or find_best(db, model, task, max_accuracy_drop, min_speedup, device)
        source = _model_source(db, plan, model_path)
        document = describe(plan, identities.model(db, plan.model_id), identities.task(db, plan.task_id))
    artefact = None
    if plan.artefact is not None and plan.artefact_checksum is not None:
        artefact = Artefact(plan.artefact, plan.artefact_checksum)
    written = export_plan(
        document, source, format_name, output, force=force, force_model=force_model, artefact=artefact
    )
    if as_json:
        print_json({"plan": plan.id, "format": format_name, "output": str(output), "notes": list(written.notes)})
    else:
        print_line(f"plan {plan.id} ({plan.plan}) written to {output}")
        for note in written.notes:
            print_line(f"note: {note}")
    return 0


def _chosen(db: Database, plan_id: int | None) -> Plan | None:
    from storage import plans

    return None if plan_id is None else plans.get(db, plan_id)


def _model_source(db: Database, plan: Plan, model_path: str | None) -> ModelSource:
    """The model as the plan's job loaded it, or the one at ``model_path``."""
    from storage import jobs
    from workers.messages import ModelSource

    # Of the specification the model alone: whatever else a job of another version says must not stand in the way.
    stored = {"path": plan.model} if plan.job_id is None else dict(jobs.get(db, plan.job_id).spec["model"])
    source = ModelSource(**stored | {"allow_pickle": tuple(stored.get("allow_pickle", ()))})
    return source if model_path is None else moved(source, model_path)


def moved(source: ModelSource, model_path: str) -> ModelSource:
    """The same source at another place: a local path or a hub id."""
    from dataclasses import replace

    local = Path(model_path).expanduser()
    return replace(source, path=str(local.resolve()) if local.exists() else model_path, revision=None)
