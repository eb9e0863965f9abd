"""The options that commands share, the database they name, and printing for people and programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from storage.database import Database

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
JobFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Job file (YAML).", show_default=False)]
JobNumber = Annotated[int, typer.Argument(metavar="JOB", help="Number of the job.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", help="Name, path, hub id or fingerprint.")]
Task = Annotated[str | None, typer.Option("--task", help="Name of the task; of a job's several, joined by +.")]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-accuracy-drop",
        min=0.0,
        max=1.0,
        help="Largest loss, as a share, judged on the worse end of its interval.",
    ),
]
MinSpeedup = Annotated[
    float | None, typer.Option("--min-speedup", min=0.0, help="Smallest speed-up, as measured (the median).")
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine", metavar="NAME", help="Speed as this engine served the plans (vllm, llama.cpp, ...); no other plans."
    ),
]
Concurrency = Annotated[
    int | None, typer.Option("--concurrency", min=1, help="With --engine: requests in flight at once; 1 when absent.")
]
AllVersions = Annotated[
    bool,
    typer.Option(
        "--all-versions", help="Include plans of earlier versions of the model files, data, prompt or metric, marked."
    ),
]
Lossless = Annotated[
    bool,
    typer.Option("--lossless", help="Plans that draft for the dense model, which verifies, in the place of others."),
]
Device = Annotated[str | None, typer.Option("--device", help="Device, or a part of its name.")]
MaxCollateralDrop = Annotated[
    float | None,
    typer.Option(
        "--max-collateral-drop",
        min=-1.0,
        max=1.0,
        help="Largest loss on other tasks, as a share; only plans that were measured on some.",
    ),
]
MaxTextKl = Annotated[
    float | None,
    typer.Option("--max-text-kl", min=0.0, help="Largest divergence on general text, in nats a token."),
]
ModelPath = Annotated[
    str | None, typer.Option("--model-path", help="Where the model is now, if not where it was measured.")
]
ForceModel = Annotated[
    bool, typer.Option("--force-model", help="Take a model with another fingerprint than the plan's.")
]


@dataclass(frozen=True)
class GlobalOptions:
    """Options of the program itself."""

    database: str | None = None
    debug: bool = False
    quiet: bool = False


def global_options(context: typer.Context) -> GlobalOptions:
    """Return the program's options, as given anywhere on the command line."""
    found = context.obj
    return found if isinstance(found, GlobalOptions) else GlobalOptions()


def database_url(context: typer.Context) -> str:
    """Return the URL that the options, else the environment, name."""
    from optimizer.job.spec import DEFAULT_DATABASE

    return global_options(context).database or os.environ.get("SKIPPLAN_DATABASE") or DEFAULT_DATABASE


@contextmanager
def open_database(context: typer.Context, *, check_schema: bool = True, create: bool = False) -> Iterator[Database]:
    """Open the database that the options or the environment name; it must exist already unless ``create``."""
    from storage.database import Database

    with Database.open(database_url(context), create=create, check_schema=check_schema) as db:
        yield db


def print_json(value: Any) -> None:
    """Write a JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def print_line(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def print_either(as_json: bool, value: Any, lines: Iterable[str]) -> None:
    """Write a JSON document where one is wanted, else the lines for people."""
    if as_json:
        print_json(value)
    else:
        for line in lines:
            print_line(line)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, and the directories above it. Raises UsageFault when it cannot be written."""
    from optimizer.errors import UsageFault

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UsageFault(f"{path}: cannot be written: {error.strerror}") from None
