"""``skipplan report``, ``compare``, ``evaluations`` and ``dashboard``: jobs on pages, in tables, in a browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from optimizer.cli.options import (
    AsJson,
    Force,
    JobNumber,
    open_database,
    print_either,
    print_json,
    print_line,
    write_file,
)

if TYPE_CHECKING:
    from storage.database import Database

app = typer.Typer()

ReportFormat = Literal["html", "png"]
FigureName = Literal["front", "plans", "redundancy", "theory", "progress", "latency"]


@app.command()
def report(
    context: typer.Context,
    job: Annotated[int | None, typer.Argument(metavar="[JOB]", help="Id of the job; the latest if absent.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write; report-JOB.html or .png if absent.")
    ] = None,
    format_name: Annotated[ReportFormat, typer.Option("--format", help="A page, or a picture for print.")] = "html",
    figure: Annotated[FigureName, typer.Option("--figure", help="Which picture, for png.")] = "front",
    compare: Annotated[
        tuple[int, int] | None, typer.Option("--compare", metavar="JOB JOB", help="Two jobs side by side.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Write a job's report: summary, front, plans, redundancy, theory, search, latency, provenance.

    The HTML file is self-contained: it can be mailed and opens without a network.

    [bold]Examples:[/bold]

    skipplan report 7 --output report.html

    skipplan report --compare 7 9 --output both.html

    skipplan report 7 --format png --figure front --output front.png
    """
    from optimizer.errors import UsageFault

    if compare is not None and (job is not None or format_name == "png"):
        raise UsageFault("--compare takes its two jobs itself and writes html; leave JOB and --format png out")
    with open_database(context) as db:
        chosen = compare if compare is not None else (job if job is not None else _latest(db),)
        target = output or Path(f"report-{'-'.join(map(str, chosen))}.{format_name}")
        _check_target(target, force=force or output is None)
        content = _content(db, chosen, format_name, figure)
    write_file(target, content)
    found = {"jobs": list(chosen), "format": format_name, "output": str(target), "bytes": len(content)}
    print_either(as_json, found, [f"{target} written ({len(content) / 1e6:.1f} MB)"])
    return 0


def _content(db: Database, jobs: tuple[int, ...], format_name: ReportFormat, figure: FigureName) -> bytes:
    if len(jobs) == 2:
        from optimizer.reports.compare import write_comparison

        return write_comparison(db, jobs[0], jobs[1]).encode()
    if format_name == "html":
        from optimizer.reports.html import write_report

        return write_report(db, jobs[0]).encode()
    from optimizer.reports.picture import write_picture

    return write_picture(db, jobs[0], figure)


@app.command()
def compare(
    context: typer.Context,
    first: JobNumber,
    second: JobNumber,
    as_json: AsJson = False,
) -> int:
    """Show the limits and results of two jobs side by side; `report --compare` draws them.

    [bold]Example:[/bold] skipplan compare 7 9
    """
    from rich.table import Table

    from optimizer.cli.screen import Screen
    from optimizer.reports.compare import comparability, figures_table
    from optimizer.reports.data import collect

    with open_database(context) as db:
        reports = collect(db, first), collect(db, second)
    found, remark = figures_table(*reports), comparability(*reports)
    if as_json:
        sides = [
            {"job": report.job.id} | {row[0]: row[place] for row in found.rows}
            for place, report in enumerate(reports, start=1)
        ]
        print_json({"jobs": sides, "remark": remark})
        return 0
    table = Table(header_style="bold")
    for name in found.header:
        table.add_column(name)
    for row in found.rows:
        table.add_row(*row)
    Screen(quiet=False).table(table)
    print_line(remark)
    return 0


@app.command()
def evaluations(
    context: typer.Context,
    job: JobNumber,
    output: Annotated[Path, typer.Option("--output", help="File to write, .csv or .parquet.", show_default=False)],
    samples: Annotated[
        bool, typer.Option("--samples", help="One row for every sample of every evaluation, with its score.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Write all evaluations of a job as a table: every plan that was scored, on which samples, and how well.

    [bold]Example:[/bold] skipplan evaluations 7 --output evaluations.csv
    """
    from optimizer.reports.evaluations import evaluations_frame, samples_frame, table_bytes

    _check_target(output, force=force)
    with open_database(context) as db:
        frame = (samples_frame if samples else evaluations_frame)(db, job)
    write_file(output, table_bytes(frame, output))
    found = {"job": job, "rows": len(frame), "output": str(output)}
    print_either(as_json, found, [f"{output} written ({len(frame):,} rows)"])
    return 0


def _check_target(target: Path, *, force: bool) -> None:
    """Refuse a directory, and a file that is there already unless ``force``. Raises UsageFault."""
    from optimizer.errors import UsageFault

    if target.is_dir():
        raise UsageFault(f"{target}: is a directory; --output names a file")
    if target.exists() and not force:
        raise UsageFault(f"{target}: exists already; --force replaces it")


def _latest(db: Database) -> int:
    """Find the job submitted last. Raises UsageFault when there is none."""
    from optimizer.errors import UsageFault
    from storage.queue import jobs

    found = jobs.list_jobs(db, limit=1)
    if not found:
        raise UsageFault("there is no job in the database yet; run one with: skipplan run CONFIG")
    return found[0].id


@app.command()
def dashboard(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; a token is needed beyond loopback.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8765,
    api: Annotated[
        bool, typer.Option("--api", help="Let bearers of tokens submit, steer and export jobs; see `skipplan tokens`.")
    ] = False,
    files: Annotated[
        Path | None,
        typer.Option("--files", metavar="DIR", help="With --api: the directory whose files submitted jobs may name."),
    ] = None,
    exports: Annotated[
        Path, typer.Option("--exports", metavar="DIR", help="With --api: where exports for download are kept.")
    ] = Path("skipplan-exports"),
) -> int:
    """Show jobs with live progress, plans, models, tasks and reports in a browser, until stopped; read-only by default.

    Listens on this machine alone unless --host says otherwise; then SKIPPLAN_DASHBOARD_TOKEN has to hold a token, which
    browsers are asked for and API clients send as a bearer token. With --api nothing is shown without a token, and
    those of the roles submit and admin may write. The API is described under /docs.

    [bold]Example:[/bold] skipplan dashboard --port 8080
    """
    from optimizer.dashboard.access import check_token
    from optimizer.errors import UsageFault

    token = os.environ.get("SKIPPLAN_DASHBOARD_TOKEN") or None
    check_token(host, token, api=api)
    if files is not None and not (api and files.is_dir()):
        raise UsageFault(f"--files {files}: is no directory" if api else "--files: is read by --api alone")
    with open_database(context) as db:
        import socket

        import uvicorn

        from optimizer.dashboard.app import Writing, create_app
        from storage.queue import tokens

        writing = Writing(files, exports.resolve()) if api else None
        if api and token is None and not tokens.list_tokens(db):
            typer.echo("no token yet, nobody can enter: skipplan tokens create NAME --role submit", err=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host.strip("[]"), port))
            except OSError as error:
                raise UsageFault(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None
            where = f"[{host.strip('[]')}]" if ":" in host else host
            typer.echo(f"dashboard of {db.safe_url} at http://{where}:{port}/ (Ctrl-C stops it)", err=True)
            app_ = create_app(db, host=host, token=token, writing=writing)
            settings = uvicorn.Config(
                app_, log_level="warning", access_log=False, server_header=False, limit_concurrency=200
            )
            uvicorn.Server(settings).run(sockets=[listener])
    return 0
