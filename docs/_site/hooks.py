"""The site holds the job, task and cluster files that its pages link to, so that the links work in both places."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PROJECT = Path(__file__).resolve().parents[2]
OUTSIDE = "configs|tests|README|CHANGELOG|CONTRIBUTING|SECURITY|LICENSE"
LINK = re.compile(rf"\]\((?:\.\./)+((?:{OUTSIDE})[^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside the documentation's own directory."""
    wanted: set[str] = set()
    for page in list(files.documentation_pages()):
        wanted.update(found[1].rstrip("/") for found in LINK.finditer(page.content_string))
    for name in sorted(wanted):
        path = PROJECT / name
        for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if each.is_file() and each.suffix in (".yaml", ".yml", ".md", ".py", ""):
                files.append(_copy(each, config))
    return files


def _copy(path: Path, config: Any) -> File:
    """Copy a file of the project as it is; Markdown becomes text, since its own links lead elsewhere."""
    name = path.relative_to(PROJECT).as_posix()
    target = f"files/{name}.txt" if path.suffix in (".md", "") else f"files/{name}"
    return File.generated(config, target, content=path.read_text(encoding="utf-8"))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave the documentation at the copies; a directory becomes its README, or plain text."""
    up = "../" * page.file.src_uri.count("/")

    def moved(found: re.Match[str]) -> str:
        name = found[1].rstrip("/")
        path = PROJECT / name
        if path.is_dir():
            name = f"{name}/README.md"
        suffix = ".txt" if Path(name).suffix in (".md", "") else ""
        return f"]({up}files/{name}{suffix})" if (PROJECT / name).is_file() else "]"

    return LINK.sub(moved, markdown)
