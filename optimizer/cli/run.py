"""``skipplan run``, ``submit`` and ``serve``: work on jobs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.options import AsJson, JobFile, global_options, open_database, print_either, print_json
from optimizer.registries import STRATEGIES

if TYPE_CHECKING:
    from optimizer.cli.screen import Screen
    from storage.database import Database

app = typer.Typer()

Force = Annotated[bool, typer.Option("--force", help="Run anew even if this specification has a result already.")]
LogFormat = Annotated[
    str | None,
    typer.Option("--log-format", metavar="text|json", help="Write one line per event to standard error."),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help=f"How plans are searched, instead of the job file's search.strategy: {', '.join(STRATEGIES)}.",
    ),
]


@app.command()
def run(
    context: typer.Context,
    config: JobFile,
    force: Force = False,
    strategy: Strategy = None,
    log_format: LogFormat = None,
    as_json: AsJson = False,
) -> int:
    """Queue a job, run it in this process, and print its plans.

    A job that was interrupted or killed continues when it is run again.

    [bold]Example:[/bold] skipplan run configs/quickstart.yaml
    """
    from optimizer.cli.screen import Screen
    from optimizer.job.inputs import prepare
    from optimizer.job.loading import load_job
    from optimizer.service.runner import run_job
    from optimizer.service.server import logged_stages
    from optimizer.stages.progress import Progress
    from storage.database import Database
    from storage.queue import jobs

    logging = start_logging(log_format)
    screen = Screen(quiet=global_options(context).quiet or logging, as_json=as_json)  # a log is all that is said
    spec = load_job(config, database=global_options(context).database, strategy=strategy)
    with screen.status("checking the task's data and the model's files"):
        inputs = prepare(spec)
    with Database.open(spec.database) as db:
        job = None if force or not inputs.fingerprint else jobs.find_finished(db, inputs.spec_hash)
        if job is not None:
            screen.say(f"job {job.id} had this specification and is done; its result (--force runs it anew):")
        else:
            with logged_stages() if logging else screen.stages() as display:
                job = run_job(db, inputs, Progress(display), anew=force)
        return _print_result(db, job.id, screen, as_json)


def _print_result(db: Database, job_id: int, screen: Screen, as_json: bool) -> int:
    from optimizer.errors import NoFeasiblePlan
    from optimizer.job.result import load_result

    result = load_result(db, job_id)
    if as_json:
        print_json(result.to_json())
    else:
        screen.result(result)
    if result.best is None:
        raise NoFeasiblePlan(f"job {job_id}: {result.job.error}; the dense model is the answer")
    return 0


@app.command()
def submit(
    context: typer.Context,
    config: JobFile,
    force: Force = False,
    strategy: Strategy = None,
    priority: Annotated[
        int | None,
        typer.Option("--priority", min=-1000, max=1000, help="Overrides the job file's; higher ones come first."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Queue a job for `skipplan serve`, or a later `skipplan run`, to process.

    [bold]Example:[/bold] skipplan submit job.yaml --priority 10
    """
    from optimizer.job.inputs import prepare
    from optimizer.job.loading import load_job
    from optimizer.service import runner
    from storage.database import Database

    spec = load_job(config, database=global_options(context).database, strategy=strategy)
    if priority is not None:
        spec = spec.model_copy(update={"priority": priority})
    inputs = prepare(spec)
    with Database.open(spec.database) as db:
        job, new = runner.submit(db, inputs, anew=force)
    known = f"job {job.id} has this specification already and is {job.state} (--force queues it anew)"
    print_either(as_json, {"job": job.id, "state": job.state, "new": new}, [f"job {job.id} queued" if new else known])
    return 0


@app.command()
def serve(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Stop when the queue is empty.")] = False,
    lease: Annotated[
        float,
        typer.Option(
            "--lease",
            metavar="SECONDS",
            min=2,
            max=3600,
            help="Seconds without a heartbeat before another process may claim a job.",
        ),
    ] = 30.0,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=64, help="Jobs at the same time; those of one model share the workers.")
    ] = 1,
    log_format: LogFormat = None,
) -> int:
    """Claim and process queued jobs until stopped; several of these may share a database.

    Writes one line per event to standard error.

    [bold]Example:[/bold] skipplan --database postgresql://user:password@host/skipplan serve --log-format json
    """
    from optimizer.service.server import Server, logged_stages
    from optimizer.stages.progress import Progress

    start_logging(log_format, default="text")
    with open_database(context) as db:
        Server(db, progress=lambda job: Progress(logged_stages()), lease_seconds=lease, at_once=jobs).run(once=once)
    return 0


def start_logging(asked: str | None, default: str | None = None) -> bool:
    """Begin to write the log that the option, else the environment, asks for; whether one is written."""
    from optimizer.errors import UsageFault
    from optimizer.service import channel, logs

    form = asked or os.environ.get(logs.ENVIRONMENT) or default
    if form is not None and form not in logs.FORMATS:
        source = "--log-format" if asked else logs.ENVIRONMENT
        raise UsageFault(f"{source}: must be {' or '.join(logs.FORMATS)}, not {form!r}")
    logs.configure(form)
    channel.tell(log_format=form)
    return form is not None
