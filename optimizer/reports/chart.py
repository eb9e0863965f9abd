"""Charts as plain data for plotly, without styling beyond names of colours.

A colour is the name of a CSS variable (``"--skip"``); the page puts its value for the light or dark theme in. Every
point carries ``customdata = [plan, line of text]``, from which the page draws the plan's strip when it is pointed at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from workers.runtime.plan import Action

Trace = dict[str, Any]

COLOURS = {action.letter: f"--{action.label}" for action in Action}
SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")

MANY = 1_500
"""From so many points on, those that nobody could see are left out of a chart: outside its range, or covered."""
COLUMNS, ROWS = 320, 160
"""Of a chart with many points: cells in which one point is drawn."""


@dataclass(frozen=True)
class Chart:
    """One chart: plotly's traces and layout, the height in pixels, and a sentence for those who cannot see it."""

    name: str
    traces: tuple[Trace, ...]
    layout: dict[str, Any]
    height: int
    description: str
    heading: str = ""
    scale: bool = False
    """Whether the colour scale of a heat map stands under it."""

    def to_json(self) -> dict[str, Any]:
        layout = {**self.layout, "hovermode": "closest"}
        return {"name": self.name, "traces": list(self.traces), "layout": layout, "height": self.height}


@dataclass(frozen=True)
class Point:
    """A point of a chart; ``text`` and the strip of ``plan`` are shown when it is pointed at."""

    x: Any
    y: Any
    text: str
    plan: str = ""


def dots(name: str, points: Iterable[Point], colour: str, size: int, **marker: Any) -> Trace:
    """Draw points as markers."""
    return {"mode": "markers", "marker": {"color": colour, "size": size, **marker}, **_series("scatter", name, points)}


def steps(name: str, points: Iterable[Point], colour: str) -> Trace:
    """Draw points as a line that keeps its height up to the next point."""
    line = {"color": colour, "width": 2.5, "shape": "hv"}
    return {"mode": "lines", "line": line, **_series("scatter", name, points)}


def bars(name: str, points: Iterable[Point], colour: str, **more: Any) -> Trace:
    """Draw points as bars."""
    return {"marker": {"color": colour}, **_series("bar", name, points), **more}


def _series(kind: str, name: str, points: Iterable[Point]) -> Trace:
    drawn = list(points)
    return {
        "type": kind,
        "name": name,
        "x": [each.x for each in drawn],
        "y": [each.y for each in drawn],
        "customdata": [[each.plan, each.text] for each in drawn],
        "hoverinfo": "none",
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Describe an axis by its title and plotly's settings."""
    return {"title": {"text": title}, **more}


def thinned(
    points: Sequence[tuple[float, float]],
    across: Sequence[float] | None = None,
    upwards: Sequence[float] | None = None,
) -> list[int]:
    """Places of the points to draw: those within the ranges (all, by default), one in each small cell of the chart."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right = across or (min(xs), max(xs))
    bottom, top = upwards or (min(ys), max(ys))
    cells: dict[tuple[int, int], int] = {}
    for index, (x, y) in enumerate(points):
        if left <= x <= right and bottom <= y <= top:
            cell = (int(COLUMNS * (x - left) / (right - left or 1)), int(ROWS * (y - bottom) / (top - bottom or 1)))
            cells.setdefault(cell, index)
    return sorted(cells.values())
