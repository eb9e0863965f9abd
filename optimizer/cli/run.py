"""``skipplan run``, ``submit`` and ``serve``: work on jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.state import global_options, open_database, print_json, print_line

if TYPE_CHECKING:
    from optimizer.cli.screen import Screen
    from optimizer.inputs import Inputs
    from storage.database import Database
    from storage.jobs import Job

JobFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Job file (YAML).", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Run anew even if this specification has a result already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(run)
    app.command()(submit)
    app.command()(serve)


def run(context: typer.Context, config: JobFile, force: Force = False, as_json: AsJson = False) -> int:
    """Do a job here and now: queue it, process it, print its plans.

    Interrupted with Ctrl-C or killed, it goes on where it was when run again.

    [bold]Example:[/bold] skipplan run configs/quickstart.yaml
    """
    from optimizer.cli.screen import Screen
    from optimizer.inputs import prepare
    from optimizer.job import load_job
    from storage.database import Database

    screen = Screen(quiet=as_json)
    spec = load_job(config, database=global_options(context).database)
    with screen.status("checking the task's data and the model's files"):
        inputs = prepare(spec)
    with Database.open(spec.database) as db:
        job = None if force else _finished(db, inputs)
        if job is not None:
            screen.say(f"job {job.id} had this specification and is done; its result (--force runs it anew):")
        else:
            job = _process(db, inputs, screen, force)
        return _print_result(db, job.id, screen, as_json)


def _finished(db: Database, inputs: Inputs) -> Job | None:
    from storage import jobs

    return jobs.find_finished(db, inputs.spec_hash)


def _process(db: Database, inputs: Inputs, screen: Screen, force: bool) -> Job:
    """Start the workers first: a job that cannot begin leaves no trace in the database."""
    from optimizer import service
    from optimizer.progress import Progress
    from storage import jobs

    with screen.status("starting the workers") as status, service.open_pool(inputs) as pool:
        spec = service.stored_spec(inputs.spec)
        if force:
            job = jobs.submit(db, spec, inputs.spec_hash)
        else:
            job, _ = jobs.submit_once(db, spec, inputs.spec_hash)
        job = service.claim_this(db, job, service.new_owner(), screen.say)
        status.stop()
        with screen.live(f"job {job.id}, {pool.size} workers on {pool.info[0].device}") as display:
            service.process(db, job, inputs, pool, Progress(display))
    return job


def _print_result(db: Database, job_id: int, screen: Screen, as_json: bool) -> int:
    from optimizer.errors import NoFeasiblePlan
    from optimizer.results import load_result

    result = load_result(db, job_id)
    if as_json:
        print_json(result.to_json())
    else:
        screen.result(result)
    if result.best is None:
        raise NoFeasiblePlan(f"job {job_id}: {result.job.error}; the dense model is the answer")
    return 0


def submit(context: typer.Context, config: JobFile, force: Force = False, as_json: AsJson = False) -> int:
    """Queue a job for `skipplan serve`, or a later `skipplan run`, to process."""
    from optimizer import service
    from optimizer.inputs import prepare
    from optimizer.job import load_job
    from storage import jobs
    from storage.database import Database

    spec = load_job(config, database=global_options(context).database)
    inputs = prepare(spec)
    with Database.open(spec.database) as db:
        stored = service.stored_spec(spec)
        if force:
            job, new = jobs.submit(db, stored, inputs.spec_hash), True
        else:
            job, new = jobs.submit_once(db, stored, inputs.spec_hash)
    if as_json:
        print_json({"job": job.id, "state": job.state, "new": new})
    elif new:
        print_line(f"job {job.id} queued")
    else:
        print_line(f"job {job.id} has this specification already and is {job.state} (--force queues it anew)")
    return 0


def serve(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Stop when the queue is empty.")] = False,
) -> int:
    """Claim and process queued jobs until stopped; several of these may share a database."""
    from optimizer import service
    from optimizer.cli.screen import Screen
    from optimizer.progress import Progress

    screen = Screen(quiet=False)
    with open_database(context) as db:
        done = service.serve(db, once=once, progress=lambda job: Progress(screen.notes()), note=screen.say)
    screen.say(f"{done} job{'s' if done != 1 else ''} processed")
    return 0
