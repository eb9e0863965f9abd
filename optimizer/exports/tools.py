"""Programs of others that some formats call: where they are, and whether they know what is asked of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from optimizer.exports.formats import ExportFault


def find_program(name: str, variable: str) -> str | None:
    """The program that the environment variable names, else the one on the PATH, else None.

    Raises ExportFault when the variable names what is no program.
    """
    named = os.environ.get(variable)
    if named:
        found = shutil.which(Path(named).expanduser())
        if found is None:
            raise ExportFault(f"{variable} names {named}, which is no program")
        return found
    return shutil.which(name)


def installation_notes(name: str, variable: str) -> Sequence[str]:
    """A note when the program is not here."""
    if find_program(name, variable) is None:
        return (f"{name} was not found here (nor named in {variable}): what was written was not run",)
    return ()


def knows_option(program: str, option: str) -> bool:
    """Whether the program's help speaks of the option. Raises ExportFault when it cannot be run."""
    try:
        done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportFault(f"{program} cannot be run: {error}") from None
    return option in done.stdout + done.stderr
