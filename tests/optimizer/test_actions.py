"""An action is one row: whatever asks for actions takes a new one from the table, or says that it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import another_action
import pytest

from optimizer.cli.screen import ACTION_STYLES
from optimizer.search.space import COMPENSATED
from workers.runtime import Action
from workers.runtime.plan import LETTERS

UNDRAWN = {"screen", "report's colours"}
UNFORESEEN = {"risk by action", "nested sets of a risk by action"}
UNRUN = {"live model", "pruned checkpoint"}


@pytest.mark.parametrize(
    ("flags", "unrun"),
    [
        pytest.param("vision_only=True", UNRUN | {"layer-wise decoder"}, marks=pytest.mark.slow),
        ("removes_layer=True", set()),
        pytest.param("", UNRUN, marks=pytest.mark.slow),
    ],
)
def test_every_consumer_takes_another_action_or_names_it(flags: str, unrun: set[str]) -> None:
    run = subprocess.run(
        [sys.executable, another_action.__file__, flags], capture_output=True, text=True, env=environment(), check=False
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    assert {name for name, outcome in found.items() if outcome.startswith("refused")} == UNDRAWN | UNFORESEEN | unrun
    silent = {name: outcome for name, outcome in found.items() if not re.search(r"D|\bdim|--dim", outcome)}
    assert not silent


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "helpers")])}


def test_every_action_is_drawn() -> None:
    assert ACTION_STYLES.keys() == set(Action)
    style = (files("optimizer.reports") / "page" / "report.css").read_text(encoding="utf-8")
    themes = style.count("--run:")
    for action in Action:
        assert style.count(f"--{action.label}:") == themes > 1
        assert f".{action.letter} {{ background: var(--{action.label}); }}" in style


def test_letters_are_told_apart() -> None:
    assert len(LETTERS) == len(Action) == len({action.label for action in Action})
    assert COMPENSATED not in LETTERS
