"""Validate job and task files: load YAML strictly, and explain the first problem that pydantic finds in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from workers.text import did_you_mean, one_line

_BRANCHES = ("int", "literal['auto']")
"""Parts of a problem's location by which pydantic names the members of a union, and no field."""

_TAG = "kind"
"""The field that says which of several models a section is."""

_Kind = type[BaseModel] | None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key said twice is an error, not the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, source: str) -> Any:
    """Read YAML safely: no Python objects, no repeated keys. Raises ValueError naming source, line and column."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ValueError(one_line(f"{source}:{where} not valid YAML: {problem}")) from None


def require_one_of(value: str, names: Iterable[str]) -> str:
    """Return a name if it is one of those that are known. Raises pydantic's error for a literal, to be explained."""
    known = tuple(names)
    if value not in known:
        expected = ", ".join(repr(name) for name in known)
        raise PydanticCustomError("literal_error", "Input should be one of {expected}", {"expected": expected})
    return value


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Explain the first problem in one line: the dotted field, what is wrong, and what would be right."""
    problems = error.errors(include_url=False)
    # A misspelt field is reported before the field it left out: it is the likelier mistake.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    return one_line(_explain(first, model))


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> str:
    location, sections = _follow(problem["loc"], model)
    field, kind, given = ".".join(map(str, location)), problem["type"], problem["input"]
    around = sections[-2] if len(sections) > 1 else None
    if kind == "extra_forbidden":
        known = _fields(around)
        hint = _one_section_down(str(location[-1]), around) or did_you_mean(str(location[-1]), known)
        return f"{field}: unknown field{hint or '; known are ' + ', '.join(known)}"
    if kind == "missing":
        described = around.model_fields[str(location[-1])].description if around else None
        return f"{field}: missing; {(described or 'this field is needed').rstrip('.')}"
    if kind in ("model_type", "model_attributes_type"):
        some = ", ".join(_fields(sections[-1])[:3])
        return f"{f'{field}: ' if field else ''}must be a mapping with fields such as {some}, not {given!r}"
    if kind.startswith("union_tag"):  # one field of the section says which of several it is
        names = [tag for section in _members(around, location[-1]) for tag in _tags(section)]
        given = given.get(_TAG) if isinstance(given, Mapping) else given
        expected = ", ".join(map(repr, names))
        return f"{field}.{_TAG}: must be one of {expected}, not {given!r}{did_you_mean(str(given), names)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    message = (message[:1].lower() + message[1:]).replace("input should", "must").replace("valid tuple", "list")
    if kind == "literal_error":
        names = re.findall(r"'([^']+)'", message)
        return f"{field}: {message}, not {given!r}{did_you_mean(str(given), names)}"
    return f"{field}: {message}" if isinstance(given, Mapping) else f"{field}: {message}, not {given!r}"[:400]


def _follow(parts: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[int | str], list[_Kind]]:
    """Follow a problem's location: the names of fields on the way, and the model before the first and behind each."""
    location: list[int | str] = []
    sections: list[_Kind] = [model]
    for part in parts:
        members = _members(sections[-2], location[-1]) if location else []
        chosen = [member for member in members if part in _tags(member)]
        if chosen:
            sections[-1] = chosen[0]
        elif part not in _BRANCHES:
            sections.append(next(iter(_members(sections[-1], part)), None))
            location.append(part)
    return location, sections


def _members(section: _Kind, field: int | str) -> list[type[BaseModel]]:
    """Return the models that a field may hold."""
    annotation = section.model_fields[str(field)].annotation if section and str(field) in section.model_fields else None
    return [
        kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]


def _one_section_down(name: str, section: _Kind) -> str:
    """Suggest ``latency.max_seconds`` for ``latency_seconds``: the right field, written outside its section."""
    inner = {
        f"{outer}_{field}": f"{outer}.{field}"
        for outer in _fields(section)
        for member in _members(section, outer)
        for field in member.model_fields
    }
    exact = next((path for path in inner.values() if path.endswith(f".{name}")), None)  # of the first section
    close = difflib.get_close_matches(name, inner, n=1, cutoff=0.75)
    found = exact or (inner[close[0]] if close else None)
    return f"; did you mean {found}?" if found else ""


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields[_TAG].annotation) if _TAG in section.model_fields else ()


def _fields(section: _Kind) -> list[str]:
    return list(section.model_fields) if section else []
