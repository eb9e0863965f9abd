"""``skipplan validate``: is this job file usable, as far as can be seen without a network?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimizer.cli.plans import AsJson
from optimizer.cli.state import print_json, print_line


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(validate)


def validate(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="Job files (YAML).", show_default=False)],
    as_json: AsJson = False,
) -> int:
    """Check job files without running anything and without a network.

    Looks at every field of the job and its task, at the data and images that are on this machine, and at the model's
    files if they are. What lies on a hub is named as not checked.

    [bold]Example:[/bold] skipplan validate configs/examples/*.yaml
    """
    from dataclasses import asdict

    from optimizer.service.preflight import check_job_file

    found = [check_job_file(path) for path in configs]
    if as_json:
        print_json([asdict(each) for each in found])
        return 0
    for each in found:
        print_line(f"{each.file}: usable")
        for line in each.checked:
            print_line(f"  checked      {line}")
        for line in each.unchecked:
            print_line(f"  not checked  {line}")
        for line in each.notes:
            print_line(f"  note         {line}")
    return 0
