"""``skipplan redundancy`` and ``validate-theory``: measure the layers, and test whether that predicts harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.options import AsJson, JobFile, global_options, print_json, write_file

if TYPE_CHECKING:
    from optimizer.cli.screen import Screen
    from optimizer.job.spec import JobSpec
    from optimizer.stages.context import JobContext

app = typer.Typer()

Output = Annotated[Path | None, typer.Option("--output", help="Also write the JSON document to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw to this file (.png, .svg or .pdf).")]


@app.command()
def redundancy(
    context: typer.Context,
    config: JobFile,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal", help="Also measure the effect of every action at every layer on the answer: takes longer."
        ),
    ] = False,
    output: Output = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the measurements as CSV to this file.")] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> int:
    """Measure every layer on the calibration split; print the table and the predicted risks.

    Measurements in the database are not repeated.

    [bold]Example:[/bold] skipplan redundancy configs/quickstart.yaml --plot layers.png
    """
    from optimizer import criteria
    from optimizer.job.loading import load_job
    from optimizer.stages import dense
    from optimizer.stages.redundancy import measured
    from optimizer.validation import pictures, tables
    from workers.redundancy.kinds import AFTER_ALL, KINDS

    if plot is not None:
        pictures.check_picture(plot)
    spec = load_job(config, database=global_options(context).database)
    criterion = criteria.load(spec.criterion, spec.thresholds)
    needs = criteria.kinds_for(criterion, spec.letters)
    kinds = [kind for kind in KINDS if causal or kind not in AFTER_ALL or kind in needs]
    with _context(context, spec, "redundancy", as_json) as (job, screen):
        warning = dense.warn(job)
        table = measured(job, kinds)
    risk = criterion.risk(table)
    about = {"model": spec.model.path, "task": job.task.name, "warning": warning}
    document = {**about, **tables.measurements_json(table, risk)}
    if output is not None:
        write_file(output, json.dumps(document, indent=2) + "\n")
    if csv is not None:
        write_file(csv, tables.measurements_csv(table))
    if plot is not None:
        pictures.heat_map(table, risk, f"{spec.model.path} on {job.task.name}").savefig(plot)
    if as_json:
        print_json(document)
    else:
        screen.table(tables.layers_table(table, risk))
    if warning:
        screen.warn(f"warning: {warning}")
    return 0


@app.command()
def validate_theory(
    context: typer.Context,
    config: JobFile,
    samples: Annotated[
        int | None, typer.Option("--samples", min=2, help="Held-out samples; all of the split if absent.")
    ] = None,
    set_size: Annotated[
        int | None, typer.Option("--set-size", min=1, help="Layers tried together; a quarter of them if absent.")
    ] = None,
    output: Output = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> int:
    """Compare every criterion with measured harm: risks from calibration, harm on held-out samples.

    For each action: rank correlation over layers, sets of layers that should be safe and unsafe, overlap with what
    published methods take, and the claims of the paper. A criterion that does not predict harm is marked.

    [bold]Example:[/bold] skipplan validate-theory configs/quickstart.yaml --samples 256 --plot theory.png
    """
    from optimizer.errors import UsageFault
    from optimizer.job.loading import load_job
    from optimizer.stages import dense
    from optimizer.validation import pictures, tables
    from optimizer.validation.report import validate

    if plot is not None:
        pictures.check_picture(plot)
    spec = load_job(config, database=global_options(context).database)
    if spec.tasks:
        raise UsageFault(f"{config}: tasks: harm is measured on one task; name it in task")
    with _context(context, spec, "validate-theory", as_json) as (job, screen):
        there = len(job.task.held_out)
        if samples is not None and samples > there:
            raise UsageFault(f"--samples: {samples} is more than the {there} samples of the held-out split")
        warning = dense.warn(job)
        report = validate(job, samples=samples or there, set_size=set_size)
    document = {"warning": warning, **report.to_json()}
    if output is not None:
        write_file(output, json.dumps(document, indent=2) + "\n")
    if plot is not None:
        pictures.validation_figure(report).savefig(plot)
    if as_json:
        print_json(document)
    else:
        for each in tables.validation_tables(report):
            screen.table(each)
        for plan, reason in report.failed.items():
            screen.say(f"plan {plan} could not be evaluated: {reason}")
        for name, reason in report.left_out.items():
            screen.say(f"criterion {name} is left out: {reason}")
    if warning:
        screen.warn(f"warning: {warning}")
    return 0


@contextmanager
def _context(context: typer.Context, spec: JobSpec, purpose: str, as_json: bool) -> Iterator[tuple[JobContext, Screen]]:
    """Start workers and a job of its own for one command."""
    from optimizer.cli.screen import Screen
    from optimizer.job.inputs import prepare
    from optimizer.service.adhoc import adhoc_job
    from optimizer.stages.progress import Progress
    from storage.database import Database

    screen = Screen(quiet=global_options(context).quiet, as_json=as_json)
    with screen.status("checking the task's data and the model's files"):
        inputs = prepare(spec)
    with (
        Database.open(spec.database) as db,
        screen.stages() as display,
        adhoc_job(db, inputs, Progress(display), purpose) as job,
    ):
        yield job, screen
