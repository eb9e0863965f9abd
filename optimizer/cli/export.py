"""``skipplan export``: write a published plan for other deployments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.plans import AsJson, DeviceOption, MaxDrop, MinSpeedup, ModelOption, TaskOption, caution, find_best
from optimizer.cli.state import open_database, print_json, print_line
from optimizer.registries import EXPORT_FORMATS

if TYPE_CHECKING:
    from storage.database import Database
    from storage.records.plans import Plan


FormatName = Annotated[str, typer.Option("--format", metavar="|".join(EXPORT_FORMATS), help="What to write.")]
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
    format_name: Annotated[
        str, typer.Option("--format", metavar="|".join(EXPORT_FORMATS), help="What to write.")
    ] = "checkpoint",
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

    [bold]Examples:[/bold]

    skipplan export 7 --output exports/fast

    skipplan export --model llava-12 --task easy-vqa --max-accuracy-drop 0.01 --output exports/fast
    """
    from optimizer.cli.screen import Screen
    from optimizer.exports.writing import export_published

    with open_database(context) as db:
        plan = _chosen(db, plan_id) or find_best(db, model, task, max_accuracy_drop, min_speedup, device)
        with Screen(quiet=as_json).status(f"writing plan {plan.id} as {format_name}"):
            written = export_published(
                db, plan, format_name, output, model_path=model_path, force=force, force_model=force_model
            )
    if as_json:
        print_json({"plan": plan.id, "format": format_name, "output": str(output), "notes": notes(plan, written.notes)})
    else:
        from optimizer.cli.screen import figures

        print_line(f"plan {plan.id} ({plan.plan}) written to {output}: {figures(plan)}")
        for note in notes(plan, written.notes):
            print_line(f"note: {note}")
    return 0


def notes(plan: Plan, of_format: Sequence[str]) -> list[str]:
    """What is to be known about an export; first of all that the plan was refused, if it was."""
    refused = caution(plan)
    return [*([refused] if refused else []), *of_format]


def _chosen(db: Database, plan_id: int | None) -> Plan | None:
    from storage.records import plans

    return None if plan_id is None else plans.get(db, plan_id)
