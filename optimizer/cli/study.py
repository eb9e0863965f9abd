"""``skipplan export-study``: a job's search for optuna-dashboard."""

from __future__ import annotations

from typing import Annotated

import typer

from optimizer.cli.state import open_database, print_json, print_line


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("export-study")(export_study)


def export_study(
    context: typer.Context,
    job: Annotated[int, typer.Argument(metavar="JOB", help="Number of the job.", show_default=False)],
    storage: Annotated[
        str, typer.Option(metavar="URL", help="Optuna storage, for example sqlite:///study.db.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option(help="Name of the study; by default the job's number.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> int:
    """Write what a job tried as an Optuna study.

    [bold]Example:[/bold] skipplan export-study 3 --storage sqlite:///study.db; optuna-dashboard sqlite:///study.db
    """
    from dataclasses import asdict

    from optimizer.exports.optuna_study import export_study as write

    with open_database(context) as db:
        written = write(db, job, storage, name)
    if as_json:
        print_json(asdict(written))
    else:
        print_line(f"study {written.name!r}: {written.trials} trials, {written.complete} of them complete")
    return 0
