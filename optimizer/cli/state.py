"""What the commands share: the global options, opening the database, and printing JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from storage.database import Database


@dataclass(frozen=True)
class GlobalOptions:
    """Options given before the command."""

    database: str | None = None
    debug: bool = False


def global_options(context: typer.Context) -> GlobalOptions:
    """The options of the whole command."""
    found = context.obj
    return found if isinstance(found, GlobalOptions) else GlobalOptions()


@contextmanager
def open_database(context: typer.Context, *, check_schema: bool = True, create: bool = False) -> Iterator[Database]:
    """The database that the options or the environment name, which must exist already unless ``create``."""
    from optimizer.job.spec import DEFAULT_DATABASE
    from storage.database import Database

    url = global_options(context).database or os.environ.get("SKIPPLAN_DATABASE") or DEFAULT_DATABASE
    with Database.open(url, create=create, check_schema=check_schema) as db:
        yield db


def print_json(value: Any) -> None:
    """Write a JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def print_line(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")
