"""The table of job-file fields in the documentation, written from the models that check job files.

python docs/_site/field_table.py docs/jobs.md            rewrite the table in place
python docs/_site/field_table.py docs/jobs.md --check    exit code 1 where it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from optimizer.job.spec import JobSpec

HEADER = ("| field | default | values | meaning |", "|---|---|---|---|")


def rows(section: type[BaseModel] = JobSpec, prefix: str = "") -> Iterator[str]:
    """One row a field, in the order of the models."""
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from rows(inner, f"{prefix}{name}.")
            continue
        known = schema["properties"][name]
        about = " ".join((field.description or "").split()).replace("|", "\\|")
        of = [each for each in get_args(inner) if isinstance(each, type) and issubclass(each, BaseModel)]
        values = "list of names or mappings" if of else _values(known, schema)
        yield f"| `{prefix}{name}` | {_default(field)} | {values} | {about} |"
        for each in of:
            yield from rows(each, f"{prefix}{name}.")


def table() -> str:
    """Return the whole table in Markdown."""
    return "\n".join((*HEADER, *rows())) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, (), [], {}) or value is PydanticUndefined:
        return "none"
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _values(known: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return what a field takes, in a few words: choices, bounds, or the kind."""
    if "$ref" in known:
        known = schema["$defs"][known["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in known:
        parts = [_values(part, schema) for part in known["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "enum" in known:
        return ", ".join(f"`{choice}`" for choice in known["enum"])
    if "const" in known:
        return f"`{known['const']}`"
    kind = known.get("type", "any")
    if kind == "array":
        items = known.get("items") or known.get("prefixItems", [{}])[0]
        return f"list of {_values(items, schema)}"
    if kind == "object":
        return "names with numbers"
    return _bounded({"string": "text", "boolean": "true, false", "integer": "whole number"}.get(kind, kind), known)


def _bounded(kind: str, known: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " ".join([kind, *(f"{word} {known[key]:.12g}" for key, word in words.items() if key in known)])


def replaced(text: str) -> str:
    """Return the document with its table of fields written anew. Raises ValueError where it has none."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.startswith("| field | default |")]
    if len(starts) != 1:
        raise ValueError("there must be one table that begins with '| field | default |'")
    end = starts[0]
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "".join((*lines[: starts[0]], table(), *lines[end:]))


def main(arguments: list[str]) -> int:
    """Rewrite the table in the file named first, or check it."""
    path = Path(arguments[0])
    text = path.read_text(encoding="utf-8")
    written = replaced(text)
    if "--check" in arguments:
        return 0 if written == text else 1
    path.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
