"""What the pages name of the code exists: files, folders, and functions written as ``file.py:name``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from dead_imports import missing

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "configs/**/*.md", ".github/*.md") for path in PROJECT.glob(pattern)
)
NAMED = re.compile(r"`((?:optimizer|workers|storage|tests|configs|docs)/[\w./-]*[\w/])(?::(\w+))?`")


def names_of(path: Path) -> set[str]:
    """The functions, methods and classes that a module defines."""
    kinds = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_named_files_and_functions_exist(page: Path) -> None:
    wrong = []
    for path, name in NAMED.findall(page.read_text(encoding="utf-8")):
        there = PROJECT / path
        if not there.exists() or (name and name not in names_of(there)):
            wrong.append(f"{path}:{name}" if name else path)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_what_examples_import_exists(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [name for block in blocks for name in missing(block)] == []


def test_the_path_of_a_job_has_at_most_fifteen_steps() -> None:
    page = (PROJECT / "docs/architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| (\d+) \| `([\w/]+\.py):", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert 10 <= len(steps) <= 15
