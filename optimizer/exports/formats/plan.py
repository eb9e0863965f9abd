"""Format ``plan``: the document alone."""

from __future__ import annotations

from pathlib import Path

from optimizer.exports.interface import ExportFormat, Guide, Subject, takes_everything
from workers.runtime.plan import LEGEND


def write(subject: Subject, directory: Path) -> None:
    """Write nothing: the document stands beside every export."""


def guide(subject: Subject, directory: Path) -> Guide:
    """How the file is used."""
    return Guide(
        usage="Take the plan into another database with `skipplan import skipplan.json`, or read the file: its `plan` "
        f"has one letter per decoder layer ({LEGEND}).",
        limits=("It holds no weights: the plan is for the model with this fingerprint only.",),
    )


FORMAT = ExportFormat(
    name="plan",
    summary="the plan and its figures as JSON",
    needs_model=False,
    refusal=takes_everything,
    write=write,
    guide=guide,
)
