"""``skipplan report``: a job as a page to read or a picture to print."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimizer.cli.plans import AsJson
from optimizer.cli.state import open_database, print_json, print_line

if TYPE_CHECKING:
    from storage.database import Database


class ReportFormat(StrEnum):
    """What a report can be written as."""

    html = "html"
    png = "png"


class FigureName(StrEnum):
    """The pictures of ``--format png``."""

    front = "front"
    plans = "plans"
    redundancy = "redundancy"
    theory = "theory"
    progress = "progress"
    latency = "latency"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(report)


def report(
    context: typer.Context,
    job: Annotated[int | None, typer.Argument(metavar="[JOB]", help="Id of the job; the latest if absent.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write; report-JOB.html or .png if absent.")
    ] = None,
    format_name: Annotated[ReportFormat, typer.Option("--format", help="A page, or a picture for print.")] = (
        ReportFormat.html
    ),
    figure: Annotated[FigureName, typer.Option("--figure", help="Which picture, for png.")] = FigureName.front,
    compare: Annotated[
        tuple[int, int] | None, typer.Option("--compare", metavar="JOB JOB", help="Two jobs side by side.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write what a job found: summary, front, plans, redundancy, theory, search, latency, provenance.

    The HTML file is self-contained: it can be mailed and opens without a network.

    [bold]Examples:[/bold]

    skipplan report 7 --output report.html

    skipplan report --compare 7 9 --output both.html

    skipplan report 7 --format png --figure front --output front.png
    """
    from optimizer.errors import UsageFault

    if compare is not None and (job is not None or format_name is ReportFormat.png):
        raise UsageFault("--compare takes its two jobs itself and writes html; leave JOB and --format png out")
    with open_database(context) as db:
        chosen = compare if compare is not None else (job if job is not None else _latest(db),)
        target = output or Path(f"report-{'-'.join(map(str, chosen))}.{format_name.value}")
        if target.is_dir():
            raise UsageFault(f"{target}: is a directory; --output names a file")
        if target.exists() and output is not None and not force:
            raise UsageFault(f"{target}: exists already; --force replaces it")
        content = _content(db, chosen, format_name, figure)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise UsageFault(f"{target}: cannot be written: {error.strerror}") from None
    if as_json:
        print_json({"jobs": list(chosen), "format": format_name.value, "output": str(target), "bytes": len(content)})
    else:
        print_line(f"{target} written ({len(content) / 1e6:.1f} MB)")
    return 0


def _content(db: Database, jobs: tuple[int, ...], format_name: ReportFormat, figure: FigureName) -> bytes:
    if len(jobs) == 2:
        from optimizer.reports.compare import write_comparison

        return write_comparison(db, jobs[0], jobs[1]).encode()
    if format_name is ReportFormat.html:
        from optimizer.reports.html import write_report

        return write_report(db, jobs[0]).encode()
    from optimizer.reports.picture import write_picture

    return write_picture(db, jobs[0], figure.value)


def _latest(db: Database) -> int:
    """The job submitted last. Raises UsageFault when there is none."""
    from optimizer.errors import UsageFault
    from storage.queue import jobs

    found = jobs.list_jobs(db, limit=1)
    if not found:
        raise UsageFault("there is no job in the database yet; run one with: skipplan run CONFIG")
    return found[0].id
