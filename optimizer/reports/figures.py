"""The report's charts as data for plotly: traces and axes, no styling beyond names of colours.

A colour is the name of a CSS variable (``"--skip"``); the page puts its value for the light or dark theme in. Every
point carries ``customdata = [plan, line of text]``, from which the page draws the plan's strip when it is pointed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optimizer.reports import formatting
from optimizer.reports.data import JobReport, Tried, meets_constraint
from optimizer.reports.progress import Step, reference
from optimizer.reports.theory import TheoryCheck
from storage.records.measurements import Redundancy
from storage.records.plans import Plan
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import Action

Trace = dict[str, Any]

MANY = 1_500
"""From so many points on, those that nobody could see are left out of a chart: outside its range, or covered."""
COLUMNS, ROWS = 320, 160
"""Of a chart with many points: cells in which one point is drawn."""

SHOWN_OF_MANY = {"cosine_distance_tail": "0.1", "cosine_distance_quantile": "0.9", "angular_distance": "1"}
"""Measures taken at many thresholds or block lengths, and the one that the heat map shows; the table has all."""

COLOURS = {action.letter: f"--{action.label}" for action in Action}
SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")


@dataclass(frozen=True)
class Chart:
    """One chart: plotly's traces and layout, the height in pixels, and a sentence for those who cannot see it."""

    name: str
    traces: tuple[Trace, ...]
    layout: dict[str, Any]
    height: int
    description: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for the page."""
        return {"name": self.name, "traces": list(self.traces), "layout": self.layout, "height": self.height}


def front(report: JobReport) -> Chart | None:
    """Speed-up against the difference of accuracy to dense: verified plans with intervals, tried ones as points."""
    searched = [each for each in report.tried if each.drop is not None and each.predicted_speedup is not None]
    if not searched and not report.plans:
        return None
    many = len(searched) > MANY
    speeds, points = visible(report) or (None, None)
    if many:
        drawn = thinned(
            [(each.predicted_speedup or 0.0, -100 * (each.drop or 0.0)) for each in searched], speeds, points
        )
        searched = [searched[place] for place in drawn]
    outside = [each for each in searched if not each.within]
    within = [each for each in searched if each.within]
    kept = [plan for plan in report.plans if meets_constraint(plan) is not False]
    refused = [plan for plan in report.plans if meets_constraint(plan) is False]
    traces = [
        _searched("tried, outside the limits", outside, "--muted", 0.55, many),
        _searched("tried, within the limits", within, "--series-1", 0.75, many),
        _front_line(report.plans),
        _verified("verified, outside the limits", refused, "--muted-strong"),
        _verified("verified, within the limits", kept, "--good"),
        _dense(),
    ]
    limit = report.spec.max_accuracy_drop
    return Chart(
        "front",
        tuple(trace for trace in traces if trace["x"]),
        {
            "xaxis": {"title": {"text": "speed-up (dense = 1)"}, "range": speeds},
            "yaxis": {"title": {"text": "difference to dense, points"}, "range": points},
            "shapes": [] if limit is None else [_limit_line(-100 * limit)],
            "hovermode": "closest",
        },
        460,
        "Speed-up against the difference of accuracy to the dense model, one point a plan.",
    )


def visible(report: JobReport) -> tuple[list[float], list[float]] | None:
    """Ranges of speed-up and points that show the plans worth choosing between; None without a limit."""
    limit = report.spec.max_accuracy_drop
    if limit is None:
        return None
    floor = min([-100 * limit, *(100 * plan.difference_low for plan in report.plans)])
    ceiling = max([0.0, *(100 * plan.difference_high for plan in report.plans)])
    room = max(1.0, ceiling - floor)
    bottom, top = floor - 0.9 * room, ceiling + 0.25 * room
    speeds = [1.0, *(plan.speedup_high for plan in report.plans)]
    speeds += [
        each.predicted_speedup
        for each in report.tried
        if each.predicted_speedup is not None and each.drop is not None and -100 * each.drop >= bottom
    ]
    low, high = min(speeds), max(speeds)
    margin = 0.05 * max(0.2, high - low)
    return [low - margin, high + margin], [bottom, top]


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
    for place, (x, y) in enumerate(points):
        if left <= x <= right and bottom <= y <= top:
            cell = (int(COLUMNS * (x - left) / (right - left or 1)), int(ROWS * (y - bottom) / (top - bottom or 1)))
            cells.setdefault(cell, place)
    return sorted(cells.values())


def _searched(name: str, tried: Sequence[Tried], colour: str, opacity: float, many: bool) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [each.predicted_speedup for each in tried],
        "y": [-100 * each.drop for each in tried if each.drop is not None],
        "customdata": [[each.plan, _searched_line(each)] for each in tried],
        "marker": {"color": colour, "size": 5 if many else 7, "opacity": opacity, "symbol": "circle"},
        "hoverinfo": "none",
    }


def _searched_line(each: Tried) -> str:
    given_up = "" if each.complete else "; given up early"
    added = "" if each.compensation == NO_COMPENSATION else f"; {each.compensation}"
    return f"tried: {formatting.tried_line(each)}{given_up}{added}"


def _verified(name: str, plans: Sequence[Plan], colour: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [plan.speedup for plan in plans],
        "y": [100 * plan.difference for plan in plans],
        "error_x": _error(
            [plan.speedup_high - plan.speedup for plan in plans],
            [plan.speedup - plan.speedup_low for plan in plans],
            colour,
        ),
        "error_y": _error(
            [100 * (plan.difference_high - plan.difference) for plan in plans],
            [100 * (plan.difference - plan.difference_low) for plan in plans],
            colour,
        ),
        "customdata": [[plan.plan, _verified_line(plan)] for plan in plans],
        "marker": {"color": colour, "size": 12, "symbol": "diamond", "line": {"width": 1, "color": "--surface"}},
        "hoverinfo": "none",
    }


def _verified_line(plan: Plan) -> str:
    added = "" if plan.compensation == NO_COMPENSATION else f"; {plan.compensation}"
    return (
        f"plan {plan.id}, held-out: {formatting.points(plan.difference)} "
        f"{formatting.interval(plan.difference_low, plan.difference_high)}, "
        f"measured {plan.speedup:.2f}x [{plan.speedup_low:.2f}, {plan.speedup_high:.2f}]{added}"
    )


def _error(up: list[float], down: list[float], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": colour,
        "thickness": 1.3,
        "width": 4,
    }


def _front_line(plans: Sequence[Plan]) -> Trace:
    """The verified plans that no other verified plan of this job beats in both respects."""
    members: list[Plan] = []
    for plan in sorted(plans, key=lambda each: (-each.speedup, -each.difference)):
        if not members or plan.difference > members[-1].difference:
            members.append(plan)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front of the verified plans",
        "x": [plan.speedup for plan in members],
        "y": [100 * plan.difference for plan in members],
        "line": {"color": "--muted-strong", "width": 1.5, "shape": "vh"},
        "hoverinfo": "skip",
    }


def _dense() -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "dense",
        "x": [1.0],
        "y": [0.0],
        "customdata": [["", "dense: every layer runs"]],
        "marker": {"color": "--text", "size": 10, "symbol": "cross"},
        "hoverinfo": "none",
    }


def _limit_line(y: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": "--skip", "width": 1, "dash": "dot"},
    }


def redundancy(measurements: Sequence[Redundancy]) -> Chart | None:
    """Layer against measure and token group; every row is coloured from its own lowest to its own highest value."""
    rows = heat_rows(measurements)
    if not rows:
        return None
    layers = sorted({layer for row in rows.values() for layer in row})
    names = [row_name(name, group) for name, group in rows]
    trace = {
        "type": "heatmap",
        "x": layers,
        "y": names,
        "z": [_scaled([row[layer].value if layer in row else None for layer in layers]) for row in rows.values()],
        "customdata": [
            [_cell(name, row.get(layer)) for layer in layers] for name, row in zip(names, rows.values(), strict=True)
        ],
        "colorscale": "--sequential",
        "zmin": 0,
        "zmax": 1,
        "xgap": 1,
        "ygap": 2,
        "hoverinfo": "none",
        "showscale": False,
    }
    axis = {"title": {"text": "decoder layer"}, "dtick": 1 if len(layers) <= 16 else 4, "side": "top"}
    layout = {
        "xaxis": {**axis, "showgrid": False, "zeroline": False},
        "yaxis": {"autorange": "reversed", "showgrid": False, "zeroline": False, "automargin": True},
        "hovermode": "closest",
    }
    description = "Redundancy measures of every decoder layer, one row a measure and token group."
    return Chart("redundancy", (trace,), layout, 110 + 30 * len(names), description)


def heat_rows(measurements: Sequence[Redundancy]) -> dict[tuple[str, str], dict[int, Redundancy]]:
    """What the heat map shows, by name and token group: of curves over thresholds one point, vision and text apart.

    Other token groups are shown only for measures that have neither.
    """
    rows: dict[tuple[str, str], dict[int, Redundancy]] = {}
    for each in measurements:
        kind, _, parameter = each.name.partition("@")
        if SHOWN_OF_MANY.get(kind, parameter) == parameter:
            rows.setdefault((each.name, each.token_group), {})[each.layer] = each
    apart = {name for name, group in rows if group in ("vision", "text")}
    return {
        (name, group): rows[name, group]
        for name, group in sorted(rows, key=_row_order)
        if group in ("vision", "text") or name not in apart
    }


def _row_order(row: tuple[str, str]) -> tuple[str, float, str, str]:
    """By name, parameters as numbers: runs of 2 layers stand before runs of 10."""
    kind, _, parameter = row[0].partition("@")
    try:
        return kind, float(parameter), parameter, row[1]
    except ValueError:
        return kind, 0.0, parameter, row[1]


def row_name(name: str, group: str) -> str:
    """A measure and its token group as a person reads them: ``"cosine distance, vision"``."""
    kind, _, parameter = name.replace("_", " ").partition("@")
    return ", ".join(part for part in (kind, parameter, group) if part)


def _scaled(values: list[float | None]) -> list[float | None]:
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    return [None if value is None else (value - low) / (high - low) if high > low else 0.0 for value in values]


def _cell(name: str, measured: Redundancy | None) -> list[str]:
    if measured is None:
        return ["", f"{name}: {formatting.NOT_MEASURED}"]
    error = "" if measured.standard_error is None else f" ± {measured.standard_error:.2g} (standard error)"
    return ["", f"layer {measured.layer}, {name}: {measured.value:.4g}{error}, n = {measured.n:,}"]


def theory(check: TheoryCheck) -> Chart:
    """Predicted risk of the plans tried against the loss measured on the search split."""
    pairs = check.plans.pairs
    many = len(pairs) > MANY
    if many:
        pairs = tuple(pairs[place] for place in thinned([(pair.predicted, pair.measured) for pair in pairs]))
    trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "plan",
        "x": [pair.predicted for pair in pairs],
        "y": [pair.measured for pair in pairs],
        "customdata": [
            [pair.label, f"predicted risk {pair.predicted:.4g}, measured loss {pair.measured:.2f} points"]
            for pair in pairs
        ],
        "marker": {"color": "--series-1", "size": 5 if many else 8, "opacity": 0.7},
        "hoverinfo": "none",
    }
    layout = {
        "xaxis": {"title": {"text": f"predicted risk, criterion {check.criterion}"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "measured loss, points"}},
        "showlegend": False,
        "hovermode": "closest",
    }
    return Chart("theory", (trace,), layout, 380, "Predicted risk against measured loss, one point a plan.")


def theory_layers(check: TheoryCheck) -> Chart:
    """Each layer's predicted risk against the divergence that each action alone causes there."""
    traces = tuple(
        {
            "type": "scatter",
            "mode": "markers",
            "name": Action.of(letter).label,
            "x": [pair.predicted for pair in each.pairs],
            "y": [pair.measured for pair in each.pairs],
            "customdata": [
                ["", f"{Action.of(letter).label} at layer {pair.label}: predicted risk {pair.predicted:.4g}, "
                 f"measured divergence {pair.measured:.4g} nats"]
                for pair in each.pairs
            ],
            "marker": {"color": COLOURS[letter], "size": 9, "line": {"width": 1, "color": "--text"}},
            "hoverinfo": "none",
        }
        for letter, each in check.layers.items()
    )  # fmt: skip
    positive = all(pair.predicted > 0 and pair.measured > 0 for found in check.layers.values() for pair in found.pairs)
    layout = {
        "xaxis": {"title": {"text": f"predicted risk, criterion {check.criterion}"}},
        "yaxis": {"title": {"text": "measured divergence, nats"}, "type": "log" if positive else "linear"},
        "hovermode": "closest",
        "showlegend": True,
    }
    return Chart("theory-layers", traces, layout, 380, "Predicted risk against measured divergence, layer by layer.")


def progress(curves: Sequence[tuple[str, Sequence[Step]]], report: JobReport) -> Chart | None:
    """Share of the useful region covered after each plan, one curve a job."""
    drawn = [(name, found) for name, found in curves if found]
    if not drawn:
        return None
    limit = formatting.limit(reference(report)[1])
    return Chart(
        "progress",
        tuple(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [0, *(step.plans for step in found)],
                "y": [0, *(100 * step.covered for step in found)],
                "customdata": [
                    ["", "start"],
                    *([step.plan, f"after {step.plans} plans: {100 * step.covered:.1f} % covered"] for step in found),
                ],
                "line": {"color": SERIES[number % len(SERIES)], "width": 2.5, "shape": "hv"},
                "hoverinfo": "none",
            }
            for number, (name, found) in enumerate(drawn)
        ),
        {
            "xaxis": {"title": {"text": "plans tried"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "region covered, %"}, "rangemode": "tozero"},
            "showlegend": len(drawn) > 1,
            "hovermode": "closest",
        },
        340,
        f"Share of the region below dense latency and {limit} of loss, after each plan.",
    )
