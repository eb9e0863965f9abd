"""The OpenAPI document as a page of its own: the usual viewers load their scripts from the network, this needs none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operation."""

    name: str
    place: str
    kind: str
    required: bool
    description: str


@dataclass(frozen=True)
class Operation:
    """One path with what it takes and what it answers with."""

    path: str
    summary: str
    parameters: tuple[Parameter, ...]
    answer: str
    fields: tuple[Parameter, ...]
    """The fields of one entry of the answer."""
    statuses: tuple[str, ...]


def operations(document: Mapping[str, Any]) -> tuple[Operation, ...]:
    """Every operation of an OpenAPI document, in its order."""
    found = []
    for path, methods in document["paths"].items():
        for method in methods.values():
            schema = method["responses"]["200"]["content"]["application/json"]["schema"]
            entry = _resolved(document, schema.get("items", schema))
            found.append(
                Operation(
                    path=path,
                    summary=method.get("description") or method["summary"],
                    parameters=tuple(_parameter(document, each) for each in method.get("parameters", ())),
                    answer=_kind(document, schema),
                    fields=_fields(document, entry),
                    statuses=tuple(f"{code} {given['description']}" for code, given in method["responses"].items()),
                )
            )
    return tuple(found)


def _parameter(document: Mapping[str, Any], given: Mapping[str, Any]) -> Parameter:
    required = bool(given.get("required"))
    kind = _kind(document, given["schema"])
    return Parameter(given["name"], given["in"], kind, required, given.get("description", ""))


def _fields(document: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[Parameter, ...]:
    required = schema.get("required", ())
    return tuple(
        Parameter(name, "", _kind(document, field), name in required, field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    )


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return found


def _kind(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(document, each) for each in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_kind(document, schema.get('items', {}))}"
    limits = [f"{sign} {schema[key]}" for key, sign in (("minimum", "from"), ("maximum", "to")) if key in schema]
    return " ".join([str(schema.get("format") or schema.get("type", "any")), *limits])
