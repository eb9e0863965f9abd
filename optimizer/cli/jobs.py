"""``skipplan jobs``: what is queued, running and done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimizer.cli.state import open_database, print_json

if TYPE_CHECKING:
    from storage.jobs import Job


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(jobs)


def jobs(
    context: typer.Context,
    state: Annotated[list[str] | None, typer.Option("--state", help="Only jobs in this state; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to list.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> int:
    """List jobs, the newest first."""
    from storage import jobs as queue

    with open_database(context) as db:
        found = queue.list_jobs(db, state or (), limit)
    if as_json:
        print_json([_row(job) for job in found])
        return 0
    from rich.table import Table

    from optimizer.cli.screen import Screen

    table = Table(header_style="bold")
    for name in ("id", "state", "model", "task", "progress", "submitted", "reason"):
        table.add_column(name)
    for job in found:
        row = _row(job)
        table.add_row(
            str(job.id),
            job.state,
            row["model"],
            row["task"],
            _progress(job),
            f"{job.created_at:%Y-%m-%d %H:%M}",
            job.error,
        )
    Screen(quiet=False).table(table)
    return 0


def _progress(job: Job) -> str:
    if job.state != "running" or not job.progress:
        return ""
    done, total = job.progress.get("done", 0), job.progress.get("total")
    return f"{job.progress.get('stage', '')} {done}{f'/{total}' if total else ''}"


def _row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "state": job.state,
        "model": job.spec["model"]["path"],
        "task": job.spec["task"],
        "progress": job.progress,
        "owner": job.owner,
        "attempt": job.attempt,
        "reason": job.error,
        "submitted": job.created_at.isoformat(),
        "started": None if job.started_at is None else job.started_at.isoformat(),
        "finished": None if job.finished_at is None else job.finished_at.isoformat(),
    }
