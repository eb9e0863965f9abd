"""``skipplan verify-export`` and ``import``: what comes back from exports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.export import ForceModel, ModelPath
from optimizer.cli.plans import AsJson
from optimizer.cli.state import open_database, print_json, print_line

if TYPE_CHECKING:
    from optimizer.exports.verification import Verification


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(name="verify-export")(verify)
    app.command(name="import")(take)


def take(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A skipplan.json, or the directory of an export.")],
    as_json: AsJson = False,
) -> int:
    """Take a plan over from another database; its figures are marked as imported.

    [bold]Example:[/bold] skipplan import exports/fast/skipplan.json
    """
    from optimizer.exports import document
    from optimizer.exports.importing import import_plan
    from optimizer.job.result import plan_json

    read = document.read(file)  # before a database is created for nothing
    with open_database(context, create=True) as db:
        plan = import_plan(db, read, file)
    if as_json:
        print_json(plan_json(plan))
    else:
        print_line(f"plan {plan.id} ({plan.plan}) of {plan.model} on {plan.task} imported")
    return 0


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote.")],
    task: Annotated[str | None, typer.Option("--task", help="Task file, if the task is not bundled.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="How many held-out samples to ask.")] = 8,
    python: Annotated[str | None, typer.Option("--python", help="Interpreter that loads the export.")] = None,
    model_path: ModelPath = None,
    force_model: ForceModel = False,
    as_json: AsJson = False,
) -> int:
    """Load an export in a fresh process and compare its logits and answers with the live model.

    The exit code is 1 when they differ. [bold]Example:[/bold] skipplan verify-export exports/fast
    """
    from dataclasses import asdict

    from optimizer.cli.screen import Screen
    from optimizer.exports import document
    from optimizer.exports.verification import verify_export
    from optimizer.exports.writing import moved
    from workers.messages import ModelSource

    source = ModelSource(document.read(directory).model.name)
    if model_path is not None:
        source = moved(source, model_path)
    with Screen(quiet=as_json).status("loading the export in a fresh process, and the live model"):
        found = verify_export(directory, source, task=task, samples=samples, python=python, force_model=force_model)
    if as_json:
        print_json(asdict(found) | {"passed": found.passed})
    else:
        for line in _told(found):
            print_line(line)
    return 0 if found.passed else 1


def _told(found: Verification) -> list[str]:
    lines = [f"{found.files} files are as they were written"]
    if found.loaded:
        where = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        same = len(found.answers) - len(found.differing)
        lines += [
            f"loaded as {found.model_class} by {where}, without this project",
            f"{same} of {len(found.answers)} answers equal; logits differ by at most "
            f"{found.largest_logit_difference:.2e} of the largest (allowed {found.tolerance:.0e})",
        ]
        lines += [
            f"{sample}: live {pair[0]!r}, export {pair[1]!r}"
            for sample, pair in found.answers.items()
            if sample in found.differing
        ]
    else:
        lines.append(f"format {found.format} holds no model to load")
    return [*lines, *(f"note: {note}" for note in found.notes), "passed" if found.passed else "FAILED"]
