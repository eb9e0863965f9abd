"""The pages list every name that a job file or a command takes, and no page of first steps grows long."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.main

from optimizer.cli.main import app
from optimizer.registries import CRITERIA, EXPORT_FORMATS, STRATEGIES
from workers.tasks.metrics import METRICS

PROJECT = Path(__file__).resolve().parents[2]
COMMANDS = list(typer.main.get_command(app).commands)
LISTS = {
    "docs/search.md": STRATEGIES.built_in,
    "docs/theory.md": CRITERIA.built_in,
    "docs/exports.md": EXPORT_FORMATS.built_in,
    "docs/tasks.md": METRICS.built_in,
    "docs/command-line.md": COMMANDS,
}


@pytest.mark.parametrize("page", LISTS)
def test_a_page_lists_every_registered_name(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    assert [name for name in LISTS[page] if f"`{name}" not in text] == []


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 70
