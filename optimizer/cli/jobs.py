"""``skipplan jobs``: list, show, watch, cancel, resume and remove the jobs of the queue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimizer.cli.options import AsJson, JobNumber, open_database, print_json, print_line

if TYPE_CHECKING:
    from storage.database import Database
    from storage.queue.events import Event
    from storage.queue.jobs import Job

app = typer.Typer(help="The queue of jobs: waiting, running and finished. Without a command they are listed.")

JobNumbers = Annotated[list[int], typer.Argument(metavar="JOB...", help="Numbers of jobs.", show_default=False)]

WATCH_SECONDS = 1.0
EXIT_CODES = {"succeeded": 0, "infeasible": 3, "failed": 1, "cancelled": 1}


@app.callback(invoke_without_command=True)
def _alone(context: typer.Context) -> int | None:
    return list_(context) if context.invoked_subcommand is None else None


@app.command("list")
def list_(
    context: typer.Context,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only jobs in this state; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to list.")] = 50,
    as_json: AsJson = False,
) -> int:
    """List jobs, the newest first.

    [bold]Example:[/bold] skipplan jobs list --state running --state queued
    """
    from optimizer.job.result import tasks_of_job
    from storage.queue import jobs

    with open_database(context) as db:
        found = jobs.list_jobs(db, state or (), limit)
    if as_json:
        print_json([_row(job) for job in found])
        return 0
    from rich.table import Table

    from optimizer.cli.screen import Screen

    table = Table(header_style="bold")
    for name in ("id", "state", "priority", "model", "task", "progress", "submitted", "reason"):
        table.add_column(name)
    for job in found:
        model, task = job.spec["model"]["path"], tasks_of_job(job.spec)
        submitted = f"{job.created_at:%Y-%m-%d %H:%M}"
        table.add_row(str(job.id), job.state, str(job.priority), model, task, _progress(job), submitted, job.error)
    Screen(quiet=False).table(table)
    return 0


@app.command()
def show(context: typer.Context, job: JobNumber, as_json: AsJson = False) -> int:
    """Show one job: its state and progress, its counters, finished stages and history.

    [bold]Example:[/bold] skipplan jobs show 7
    """
    from optimizer.job.loading import unreadable
    from storage.queue import events, jobs, stages

    with open_database(context) as db:
        found = jobs.get(db, job)
        problem = unreadable(found)
        counters = _counters(found, stages.counters(db, job))
        finished = stages.stages(db, job)
        history = events.for_job(db, job)
    if as_json:
        print_json(
            _row(found)
            | {
                "problem": problem or None,
                "counters": counters,
                "stages": {name: stage.recorded_at.isoformat() for name, stage in finished.items()},
                "events": [_event(event) for event in history],
                "specification": found.spec,
            }
        )
        return 0
    for name, value in _row(found).items():
        if value not in (None, "", {}):
            print_line(f"{name:<10} {_progress(found) if name == 'progress' else value}")
    if problem:
        print_line(f"{'problem':<10} {problem}")
    print_line(f"{'counters':<10} {', '.join(f'{name} {value:,g}' for name, value in counters.items()) or 'none'}")
    print_line(f"{'stages':<10} {', '.join(finished) or 'none finished'}")
    for event in history:
        print_line(_line(event))
    return 0


@app.command()
def watch(context: typer.Context, job: JobNumber, as_json: AsJson = False) -> int:
    """Follow a job from any shell until it ends; the exit code says how it ended (0, 3 infeasible, 1 otherwise).

    [bold]Example:[/bold] skipplan jobs watch 7
    """
    with open_database(context) as db:
        return _follow(db, job, as_json=as_json)


def _follow(db: Database, number: int, *, as_json: bool) -> int:
    from storage.queue import events, jobs

    seen, last = 0, ""
    while True:
        job = jobs.get(db, number)  # before the events, so that none of an ended job is missed
        for event in events.for_job(db, number, after=seen):
            seen = event.id
            _print_news(_event(event) if as_json else _line(event))
        progress = _progress(job)
        if progress and progress != last:
            last = progress
            _print_news({"progress": job.progress} if as_json else progress)
        if job.is_finished:
            return EXIT_CODES[job.state]
        time.sleep(WATCH_SECONDS)


def _print_news(news: dict[str, Any] | str) -> None:
    import json
    import sys

    print_line(news if isinstance(news, str) else json.dumps(news, default=str))
    sys.stdout.flush()


@app.command()
def cancel(
    context: typer.Context,
    job: JobNumbers,
    reason: Annotated[str, typer.Option(help="Kept with the job.")] = "cancelled by a user",
) -> int:
    """Stop waiting or running jobs; their measurements stay, and they can be resumed.

    [bold]Example:[/bold] skipplan jobs cancel 7 8
    """
    from storage.queue import jobs

    with open_database(context) as db:
        for number in job:
            jobs.cancel(db, number, reason)
            print_line(f"job {number} cancelled")
    return 0


@app.command()
def resume(context: typer.Context, job: JobNumbers) -> int:
    """Queue failed or cancelled jobs again; they continue where they stopped.

    [bold]Example:[/bold] skipplan jobs resume 7
    """
    from optimizer.job.loading import read_spec
    from storage.queue import jobs

    with open_database(context) as db:
        for number in job:
            jobs.resume(db, number, read_spec(jobs.get(db, number)).attempts)
            print_line(f"job {number} queued")
    return 0


@app.command()
def remove(context: typer.Context, job: JobNumbers) -> int:
    """Delete jobs that do not run, with their evaluations and published plans.

    [bold]Example:[/bold] skipplan jobs remove 7
    """
    from storage.queue import jobs

    with open_database(context) as db:
        for number in job:
            jobs.remove(db, number)
            print_line(f"job {number} removed")
    return 0


def _counters(job: Job, counters: dict[str, float]) -> dict[str, float]:
    """Add to a job's counters how often it was begun."""
    return counters | {"attempts": float(job.attempt)}


def _progress(job: Job) -> str:
    if job.state != "running" or not job.progress:
        return ""
    done, total = job.progress.get("done", 0), job.progress.get("total")
    return f"{job.progress.get('stage', '')} {done}{f'/{total}' if total else ''}"


def _event(event: Event) -> dict[str, Any]:
    return {"at": event.at.isoformat(), "event": event.kind, "attempt": event.attempt, "message": event.message}


def _line(event: Event) -> str:
    return f"{event.at:%Y-%m-%d %H:%M:%S} {event.kind:<14} {event.message}"


def _row(job: Job) -> dict[str, Any]:
    from optimizer.job.result import tasks_of_job

    return {
        "id": job.id,
        "state": job.state,
        "priority": job.priority,
        "model": job.spec["model"]["path"],
        "task": tasks_of_job(job.spec),
        "progress": job.progress,
        "owner": job.owner,
        "attempt": job.attempt,
        "reason": job.error,
        "submitted": job.created_at.isoformat(),
        "not_before": None if job.not_before is None else job.not_before.isoformat(),
        "started": None if job.started_at is None else job.started_at.isoformat(),
        "finished": None if job.finished_at is None else job.finished_at.isoformat(),
    }
