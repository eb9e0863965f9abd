"""Draw the report's charts: front, redundancy, theory and progress of the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimizer.job.result import drafting_of, losses, meets_constraint
from optimizer.reports import formatting
from optimizer.reports.chart import COLOURS, MANY, SERIES, Chart, Point, Trace, axis, dots, steps, thinned
from optimizer.reports.data import JobReport, TrialSummary
from optimizer.reports.heights import Objective, height
from optimizer.reports.progress import Step, reference
from optimizer.reports.theory import TheoryCheck
from storage.records.measurements import Redundancy
from storage.records.plans import LOSSLESS, Plan
from workers.runtime.plan import Action

SHOWN_OF_MANY = {"cosine_distance_tail": "0.1", "cosine_distance_quantile": "0.9", "angular_distance": "1"}
"""Measures taken at many thresholds or block lengths, and the one that the heat map shows; the table has all."""


def front(report: JobReport) -> Chart | None:
    """Speed-up against the difference of accuracy to dense: verified plans with intervals, tried ones as points."""
    if report.spec.mode == LOSSLESS:
        return drafting(report)
    placed = [
        (each, each.predicted_speedup, 100 * each.difference)
        for each in report.trials
        if each.difference is not None and each.predicted_speedup is not None
    ]
    if not placed and not report.plans:
        return None
    many = len(placed) > MANY
    speeds, points = visible(report) or (None, None)
    if many:
        placed = [placed[index] for index in thinned([(x, y) for _, x, y in placed], speeds, points)]

    def tried(name: str, within: bool, colour: str, opacity: float) -> Trace:
        drawn = (Point(x, y, _trial_line(each), each.plan) for each, x, y in placed if each.within is within)
        return dots(name, drawn, colour, 5 if many else 7, opacity=opacity, symbol="circle")

    kept = [plan for plan in report.plans if meets_constraint(plan) is not False]
    refused = [plan for plan in report.plans if meets_constraint(plan) is False]
    traces = [
        tried("tried, outside the limits", False, "--muted", 0.55),
        tried("tried, within the limits", True, "--series-1", 0.75),
        _front_line(report.plans, report.spec.objective),
        _verified("verified, outside the limits", refused, "--muted-strong", report.spec.objective),
        _verified("verified, within the limits", kept, "--good", report.spec.objective),
        dots("dense", [Point(1.0, 0.0, "dense: every layer runs")], "--text", 10, symbol="cross"),
    ]
    limit = report.spec.allowed_loss
    return Chart(
        "front",
        tuple(trace for trace in traces if trace["x"]),
        {
            "xaxis": axis("speed-up (dense = 1)", range=speeds),
            "yaxis": axis("difference to dense, points", range=points),
            "shapes": [] if limit is None else [_limit_line(-100 * limit)],
        },
        460,
        "Speed-up against the difference of accuracy to the dense model, one point a plan.",
    )


def drafting(report: JobReport) -> Chart | None:
    """Speed-up of decoding against acceptance: verified drafters with intervals, tried ones as expected."""
    tried = [
        Point(each.predicted_speedup, 100 * each.accuracy, _trial_line(each), each.plan)
        for each in report.trials
        if each.predicted_speedup is not None
    ]
    verified = [(plan, own) for plan in report.plans if (own := drafting_of(plan)) is not None]
    if not tried and not verified:
        return None
    traces = [
        dots("tried, as expected", tried, "--series-1", 7, opacity=0.6, symbol="circle"),
        _drafters("verified, outside the limits", verified, "--muted-strong", within=False),
        _drafters("verified, within the limits", verified, "--good", within=True),
        dots("dense", [Point(1.0, 100.0, "dense: nothing is drafted")], "--text", 10, symbol="cross"),
    ]
    return Chart(
        "front",
        tuple(trace for trace in traces if trace["x"]),
        {"xaxis": axis("speed-up of decoding (dense = 1)"), "yaxis": axis("acceptance, %")},
        460,
        "Speed-up of decoding against acceptance, one point a plan.",
    )


def _drafters(name: str, verified: Sequence[tuple[Plan, dict[str, Any]]], colour: str, *, within: bool) -> Trace:
    shown = [(plan, own) for plan, own in verified if (meets_constraint(plan) is not False) is within]
    points = [
        Point(
            own["decoding_speedup"],
            100 * own["acceptance"],
            f"plan {plan.id}, held-out: {formatting.drafting(plan)}; decoding {formatting.decoding(own)}",
            plan.plan,
        )
        for plan, own in shown
    ]

    def error(figure: str, scale: float) -> dict[str, Any]:
        up = [scale * (own[f"{figure}_high"] - own[figure]) for _, own in shown]
        down = [scale * (own[figure] - own[f"{figure}_low"]) for _, own in shown]
        return _error(up, down, colour)

    return dots(name, points, colour, 12, symbol="diamond", line={"width": 1, "color": "--surface"}) | {
        "error_x": error("decoding_speedup", 1.0),
        "error_y": error("acceptance", 100.0),
    }


def visible(report: JobReport) -> tuple[list[float], list[float]] | None:
    """Ranges of speed-up and points that show the plans worth choosing between; None without a limit."""
    limit = report.spec.allowed_loss
    if limit is None:
        return None
    heights = [height(plan, report.spec.objective) for plan in report.plans]
    floor = min([-100 * limit, *(100 * each.low for each in heights)])
    ceiling = max([0.0, *(100 * each.high for each in heights)])
    span = max(1.0, ceiling - floor)
    bottom, top = floor - 0.9 * span, ceiling + 0.25 * span
    speeds = [1.0, *(plan.speedup_high for plan in report.plans)]
    speeds += [
        each.predicted_speedup
        for each in report.trials
        if each.predicted_speedup is not None and each.difference is not None and 100 * each.difference >= bottom
    ]
    low, high = min(speeds), max(speeds)
    margin = 0.05 * max(0.2, high - low)
    return [low - margin, high + margin], [bottom, top]


def _trial_line(each: TrialSummary) -> str:
    given_up = "" if each.complete else "; given up early"
    return f"tried: {formatting.trial_line(each)}{given_up}{formatting.compensated(each)}"


def _verified(name: str, plans: Sequence[Plan], colour: str, objective: Objective) -> Trace:
    heights = {plan.id: height(plan, objective) for plan in plans}
    points = [Point(plan.speedup, 100 * heights[plan.id].value, _verified_line(plan), plan.plan) for plan in plans]
    return dots(name, points, colour, 12, symbol="diamond", line={"width": 1, "color": "--surface"}) | {
        "error_x": _error(
            [plan.speedup_high - plan.speedup for plan in plans],
            [plan.speedup - plan.speedup_low for plan in plans],
            colour,
        ),
        "error_y": _error(
            [100 * (heights[plan.id].high - heights[plan.id].value) for plan in plans],
            [100 * (heights[plan.id].value - heights[plan.id].low) for plan in plans],
            colour,
        ),
    }


def _verified_line(plan: Plan) -> str:
    lost = "; ".join(map(formatting.loss, losses(plan)))
    return (
        f"plan {plan.id}, held-out: {lost or f'{formatting.points(plan.difference)} '}"
        f"{'' if lost else formatting.difference_interval(plan)}, "
        f"measured {formatting.speedup(plan, 'x')}{formatting.compensated(plan)}"
    )


def _error(up: list[float], down: list[float], colour: str) -> dict[str, Any]:
    bounds = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return {**bounds, "color": colour, "thickness": 1.3, "width": 4}


def _front_line(plans: Sequence[Plan], objective: Objective) -> Trace:
    """Return the verified plans that no other verified plan of this job beats in both respects."""
    members: list[Plan] = []
    heights = {plan.id: height(plan, objective).value for plan in plans}
    for plan in sorted(plans, key=lambda each: (-each.speedup, -heights[each.id])):
        if not members or heights[plan.id] > heights[members[-1].id]:
            members.append(plan)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front of the verified plans",
        "x": [plan.speedup for plan in members],
        "y": [100 * heights[plan.id] for plan in members],
        "line": {"color": "--muted-strong", "width": 1.5, "shape": "vh"},
        "hoverinfo": "skip",
    }


def _limit_line(y: float) -> dict[str, Any]:
    line = {"color": "--skip", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


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
    bare = {"showgrid": False, "zeroline": False}
    layout = {
        "xaxis": axis("decoder layer", dtick=1 if len(layers) <= 16 else 4, side="top", **bare),
        "yaxis": {"autorange": "reversed", "automargin": True, **bare},
    }
    description = "Redundancy measures of every decoder layer, one row a measure and token group."
    return Chart("redundancy", (trace,), layout, 110 + 30 * len(names), description, scale=True)


def heat_rows(measurements: Sequence[Redundancy]) -> dict[tuple[str, str], dict[int, Redundancy]]:
    """Rows of the heat map, by name and token group: of curves over thresholds one point, vision and text apart.

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
    """Return a measure and its token group as a person reads them: ``"cosine distance, vision"``."""
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
        pairs = tuple(pairs[index] for index in thinned([(pair.predicted, pair.measured) for pair in pairs]))
    points = [
        Point(
            pair.predicted,
            pair.measured,
            f"predicted risk {pair.predicted:.4g}, measured loss {pair.measured:.2f} points",
            pair.label,
        )
        for pair in pairs
    ]
    layout = {
        "xaxis": axis(f"predicted risk, criterion {check.criterion}", rangemode="tozero"),
        "yaxis": axis("measured loss, points"),
        "showlegend": False,
    }
    trace = dots("plan", points, "--series-1", 5 if many else 8, opacity=0.7)
    return Chart("theory", (trace,), layout, 380, "Predicted risk against measured loss, one point a plan.")


def theory_layers(check: TheoryCheck) -> Chart:
    """Each layer's predicted risk against the divergence that each action alone causes there."""
    traces = []
    for letter, comparison in check.layers.items():
        action = Action.of(letter).label
        points = [
            Point(
                pair.predicted,
                pair.measured,
                f"{action} at layer {pair.label}: predicted risk {pair.predicted:.4g}, "
                f"measured divergence {pair.measured:.4g} nats",
            )
            for pair in comparison.pairs
        ]
        traces.append(dots(action, points, COLOURS[letter], 9, line={"width": 1, "color": "--text"}))
    positive = all(pair.predicted > 0 and pair.measured > 0 for found in check.layers.values() for pair in found.pairs)
    layout = {
        "xaxis": axis(f"predicted risk, criterion {check.criterion}"),
        "yaxis": axis("measured divergence, nats", type="log" if positive else "linear"),
        "showlegend": True,
    }
    description = "Predicted risk against measured divergence, layer by layer."
    return Chart("theory-layers", tuple(traces), layout, 380, description, "Layer by layer")


def progress(curves: Sequence[tuple[str, Sequence[Step]]], report: JobReport) -> Chart | None:
    """Share of the useful region covered after each plan, one curve a job."""
    drawn = [(name, found) for name, found in curves if found]
    if not drawn:
        return None
    traces = []
    for number, (name, found) in enumerate(drawn):
        points = [Point(0, 0, "start")]
        points += [
            Point(
                step.plans,
                100 * step.covered,
                f"after {step.plans} plans: {100 * step.covered:.1f} % covered",
                step.plan,
            )
            for step in found
        ]
        traces.append(steps(name, points, SERIES[number % len(SERIES)]))
    layout = {
        "xaxis": axis("plans tried", rangemode="tozero"),
        "yaxis": axis("region covered, %", rangemode="tozero"),
        "showlegend": len(drawn) > 1,
    }
    limit = formatting.limit(reference(report)[1])
    description = f"Share of the region below dense latency and {limit} of loss, after each plan."
    return Chart("progress", tuple(traces), layout, 340, description)
