"""``skipplan refit``: the maps of a compensated plan once more, from its record."""

from __future__ import annotations

from typing import Annotated

import typer

from optimizer.cli.export import ModelPath
from optimizer.cli.plans import AsJson
from optimizer.cli.state import open_database, print_json, print_line


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(refit)


def refit(
    context: typer.Context,
    plan_id: Annotated[int, typer.Argument(metavar="PLAN", help="Id of a compensated plan.")],
    model_path: ModelPath = None,
    as_json: AsJson = False,
) -> int:
    """Fit a compensated plan's maps again, keep them, and say whether they are the same bit by bit.

    The exit code is 1 when they are not. [bold]Example:[/bold] skipplan refit 12
    """
    from optimizer.errors import UsageFault
    from optimizer.exports.writing import moved
    from optimizer.job.inputs import model_source
    from optimizer.service.runner import read_spec
    from optimizer.stages import compensate
    from storage.queue import jobs
    from storage.records import plans

    with open_database(context) as db:
        plan = plans.get(db, plan_id)
        if plan.job_id is None:
            raise UsageFault(f"plan {plan_id} was imported: the job that its maps were fitted by is not known here")
        spec = read_spec(jobs.get(db, plan.job_id))
    source = None if model_path is None else moved(model_source(spec), model_path)
    found = compensate.refit(plan, spec, source)
    if as_json:
        print_json({"plan": plan.id, "artifact": found.artifact.location, "same": found.same})
    else:
        print_line(f"maps of plan {plan.id} written to {found.artifact.location}")
        recorded = (plan.artefact_checksum or "none")[:12]
        told = "the same bits as recorded" if found.same else f"not the bits recorded ({recorded})"
        print_line(f"checksum {found.artifact.checksum[:12]}: {told}")
    return 0 if found.same else 1
