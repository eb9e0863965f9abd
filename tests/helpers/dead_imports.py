"""Find imports of the project's own modules that lead nowhere, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ROOTS = {
    "optimizer": PROJECT,
    "workers": PROJECT,
    "storage": PROJECT,
    "reference_training": PROJECT / "tests",
    **{
        path.stem: path.parent
        for folder in ("helpers", "benchmarks")
        for path in (PROJECT / "tests" / folder).glob("*.py")
    },
}


def file_of(module: str) -> Path | None:
    """The file of a module of the project; None for any other module."""
    root = ROOTS.get(module.split(".")[0])
    if root is None:
        return None
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def defined(path: Path) -> Iterator[str]:
    """Names that a module binds at its top level, also under ``if TYPE_CHECKING``."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for each in node.body if isinstance(node, ast.If) else [node]:
            if isinstance(each, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                yield each.name
            elif isinstance(each, ast.Import | ast.ImportFrom):
                yield from (alias.asname or alias.name for alias in each.names)
            elif isinstance(each, ast.Assign | ast.AnnAssign):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def missing(code: str) -> Iterator[str]:
    """What a program imports of the project's own modules and is not there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if (path := file_of(alias.name)) and not path.is_file())
        elif isinstance(node, ast.ImportFrom) and node.module and (path := file_of(node.module)) is not None:
            if not path.is_file():
                yield node.module
                continue
            known = set(defined(path))
            for alias in node.names:
                below = path.parent / alias.name
                package = path.name == "__init__.py" and (below.is_dir() or below.with_suffix(".py").is_file())
                lazy = "__getattr__" in known
                if alias.name not in known and not package and not lazy:
                    yield f"{node.module}.{alias.name}"
