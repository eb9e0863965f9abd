"""What the benchmarks import of the project exists: they are scripts that no test runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from dead_imports import PROJECT, missing

SCRIPTS = sorted((PROJECT / "tests/benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_benchmark_imports_exists(script: Path) -> None:
    assert list(missing(script.read_text(encoding="utf-8"))) == []
