"""``skipplan doctor``: is everything there that a job needs?"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from optimizer.cli.plans import AsJson
from optimizer.cli.state import global_options, print_json, print_line

AREAS_OF_CODE_4 = ("database", "cluster")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)


def doctor(
    context: typer.Context,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="ADDRESS", help="Ray cluster to look at; wins over the environment."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check versions, devices, bundled models and tasks, the database and the cluster, and say what to do.

    Looks at what the options and the environment name, and changes nothing. The exit code is 2 where the installation
    has a problem, 4 where the database or the cluster has one.

    [bold]Example:[/bold] skipplan doctor --cluster auto
    """
    from dataclasses import asdict

    from optimizer.cli.diagnostics import examine
    from optimizer.job.spec import DEFAULT_DATABASE

    url = global_options(context).database or os.environ.get("SKIPPLAN_DATABASE") or DEFAULT_DATABASE
    address = cluster or os.environ.get("SKIPPLAN_CLUSTER_ADDRESS") or "local"
    found = []
    for finding in examine(url, address):
        found.append(finding)
        if not as_json:
            print_line(f"{finding.state:<8} {finding.area:<18} {finding.detail}")
            if finding.advice:
                print_line(f"{'':<27} {finding.advice}")
    if as_json:
        print_json([asdict(finding) for finding in found])
    problems = [finding.area for finding in found if finding.state == "problem"]
    if not problems:
        return 0
    return 4 if any(area in AREAS_OF_CODE_4 for area in problems) else 2
