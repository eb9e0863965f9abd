"""``skipplan init``: a job file to begin with, for a model and a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from optimizer.cli.plans import AsJson
from optimizer.cli.state import print_json, print_line


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(init)


def _seen_from(directory: Path, name: str) -> str:
    """A path given from here, as a job file in ``directory`` has to say it; a name that is no path stays."""
    return os.path.relpath(Path(name).resolve(), directory) if Path(name).exists() else name


def init(
    model: Annotated[str, typer.Option("--model", help="Directory, bundled name or hub id.", show_default=False)],
    task: Annotated[str, typer.Option("--task", help="Bundled task or task file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="Job file to write.")] = Path("job.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a commented job file for a model and a task.

    Looks at the model's configuration, never at its weights, and at the task file, to say how many layers there are,
    which actions the model takes, and what sizes suit the task.

    [bold]Example:[/bold] skipplan init --model llava-12 --task easy-vqa --output job.yaml
    """
    from optimizer.errors import UsageFault
    from optimizer.job.template import describe

    if output.exists() and not force:
        raise UsageFault(f"{output}: exists already; --force replaces it")
    directory = output.resolve().parent
    written = describe(_seen_from(directory, model), _seen_from(directory, task), directory)
    try:
        output.write_text(written.text, encoding="utf-8")
    except OSError as error:
        raise UsageFault(f"{output}: cannot be written: {error.strerror}") from None
    if as_json:
        print_json({"output": str(output), "layers": written.layers, "actions": list(written.actions)})
    else:
        print_line(f"{output} written; next: skipplan validate {output}, then skipplan run {output}")
    return 0
