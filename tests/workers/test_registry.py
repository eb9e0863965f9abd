"""Names registered by rows and by entry points."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from workers.errors import UnknownNameError
from workers.registry import Registry


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    found: list[EntryPoint] = []
    monkeypatch.setattr(
        "workers.registry.entry_points",
        lambda group, name=None: [each for each in found if each.group == group and name in (None, each.name)],
    )
    return found


def test_rows_come_first_and_win(points: list[EntryPoint]) -> None:
    points += [EntryPoint("zip", "no.such:thing", "g"), EntryPoint("one", "no.such:thing", "g")]
    registry: Registry[object] = Registry("g", {"one": 1, "pi": "math:pi"})
    assert list(registry) == ["one", "pi", "zip"] and len(registry) == 3
    assert (registry["one"], registry["pi"]) == (1, sys.modules["math"].pi)


def test_names_are_known_without_an_import(points: list[EntryPoint]) -> None:
    points.append(EntryPoint("zip", "no.such:thing", "g"))
    registry: Registry[object] = Registry("g", {"far": "also.no:such"})
    assert "zip" in registry and "far" in registry and registry.check("zip") == "zip" and "zap" not in registry
    for name in ("zip", "far"):
        with pytest.raises(UnknownNameError, match=f"^'{name}' cannot be imported from .*No module named"):
            registry[name]


def test_what_is_unknown_or_offered_twice_is_said(points: list[EntryPoint]) -> None:
    registry: Registry[object] = Registry("g", {"checkpoint": 1})
    with pytest.raises(UnknownNameError, match=r"^'checkpiont' is unknown; choose one of checkpoint; did you mean"):
        registry["checkpiont"]
    points += [EntryPoint("two", "a:b", "g"), EntryPoint("two", "c:d", "g")]
    with pytest.raises(UnknownNameError, match="several packages"):
        registry["two"]
    assert registry.get("none", 0) == 0


def test_what_others_register_is_adapted(points: list[EntryPoint]) -> None:
    points.append(EntryPoint("e", "math:e", "g"))
    registry: Registry[float] = Registry("g", {"pi": "math:pi"}, adapt=lambda name, value: round(value))
    assert registry["e"] == 3 and registry["pi"] > 3
