"""The report's charts as pictures for print, drawn by matplotlib from the same data as the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from optimizer.errors import UsageFault
from optimizer.reports import figures, formatting, latency, sections, theory
from optimizer.reports.data import JobReport, collect
from optimizer.reports.figures import Chart, Trace
from optimizer.reports.html import search_curves
from storage.database import Database
from workers.runtime.plan import LETTERS, Action

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

WIDTH_INCHES = 8.0
DOTS_PER_INCH = 200
MARKERS = {"circle": "o", "diamond": "D", "diamond-open": "D", "cross": "P"}


def write_picture(db: Database, job_id: int, name: str) -> bytes:
    """One of a job's charts as PNG. Raises NotFound, or UsageFault when there is nothing to draw or no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UsageFault("pictures need matplotlib: pip install 'skipplan[figures]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    report = collect(db, job_id)
    if name == "plans":
        return _drawn(lambda part: strips(part, report), 0.8 + 0.3 * max(1, len(_strip_rows(report))))
    chart = _chart(db, report, name)
    if chart is None:
        raise UsageFault(f"job {job_id}: {name} was {formatting.NOT_MEASURED}, so there is nothing to draw")
    if name == "front" and report.plans:
        return _front_with_strips(chart, report)
    return _drawn(lambda part: draw(part, chart), chart.height / 100)


def _chart(db: Database, report: JobReport, name: str) -> Chart | None:
    if name == "front":
        return figures.front(report)
    if name == "redundancy":
        return figures.redundancy(report.redundancy)
    if name == "theory":
        found = theory.check(report)
        return None if found is None or not found.plans.pairs else figures.theory(found)
    if name == "progress":
        return figures.progress(search_curves(db, report), report)
    return latency.breakdown(report)


def _drawn(draw_on: Callable[[SubFigure], None], height: float) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    draw_on(figure.subfigures(squeeze=False)[0][0])
    return _png(figure)


def _front_with_strips(chart: Chart, report: JobReport) -> bytes:
    from matplotlib.figure import Figure

    below = 0.9 + 0.25 * len(report.plans)
    figure = Figure(figsize=(WIDTH_INCHES, 4.3 + below), layout="constrained")
    (upper,), (lower,) = figure.subfigures(2, squeeze=False, height_ratios=(4.3, below))
    upper.suptitle(f"{report.model_name} on {report.task_name}", x=0.02, ha="left", fontweight="bold")
    draw(upper, chart)
    strips(lower, report, verified_only=True)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": "skipplan"})
    return buffer.getvalue()


def draw(part: SubFigure, chart: Chart) -> None:
    """Every trace of a chart, with its axes and legend."""
    axes = part.add_subplot()
    stacked: dict[Any, float] = {}
    bars = [trace for trace in chart.traces if trace["type"] == "bar"]
    for trace in chart.traces:
        if trace["type"] == "heatmap":
            _heat_map(axes, trace)
        elif trace["type"] == "bar":
            _bars(axes, trace, stacked, bars.index(trace), len(bars) if chart.layout.get("barmode") == "group" else 1)
        elif trace["mode"] == "lines":
            _line(axes, trace)
        else:
            _points(axes, trace)
    _axes(axes, chart.layout)
    for shape in chart.layout.get("shapes", ()):
        axes.axhline(shape["y0"], color=colour(shape["line"]["color"]), linewidth=1, linestyle=":")
    if chart.layout.get("showlegend", len(chart.traces) > 1):
        part.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)


def _axes(axes: Axes, layout: dict[str, Any]) -> None:
    for which, set_label, set_range, set_scale in (
        ("xaxis", axes.set_xlabel, axes.set_xlim, axes.set_xscale),
        ("yaxis", axes.set_ylabel, axes.set_ylim, axes.set_yscale),
    ):
        given = layout.get(which, {})
        set_label(given.get("title", {}).get("text", ""))
        if given.get("type") == "log":
            set_scale("log")
        if given.get("range") is not None:
            set_range(given["range"])
    if layout.get("yaxis", {}).get("autorange") == "reversed" and not axes.yaxis_inverted():
        axes.invert_yaxis()
    if layout.get("xaxis", {}).get("showgrid", True):
        axes.grid(True, color=colour("--line"), linewidth=0.6)
    axes.set_axisbelow(True)


def _points(axes: Axes, trace: Trace) -> None:
    marker = trace["marker"]
    paint = colour(marker["color"])
    hollow = marker.get("symbol", "").endswith("-open")
    spread = {
        axis: [trace[axis]["arrayminus"], trace[axis]["array"]] for axis in ("error_x", "error_y") if axis in trace
    }
    if spread:
        x_spread, y_spread = spread.get("error_x"), spread.get("error_y")
        axes.errorbar(
            trace["x"], trace["y"], xerr=x_spread, yerr=y_spread, fmt="none", ecolor=paint, elinewidth=1, capsize=2.5
        )
    axes.scatter(
        trace["x"],
        trace["y"],
        s=(0.75 * marker["size"]) ** 2,
        marker=MARKERS[marker.get("symbol", "circle")],
        facecolors="none" if hollow else paint,
        edgecolors=paint if hollow else "none",
        alpha=marker.get("opacity", 1.0),
        label=trace["name"],
        zorder=3,
    )  # fmt: skip


def _line(axes: Axes, trace: Trace) -> None:
    steps = {"hv": "steps-post", "vh": "steps-pre"}[trace["line"]["shape"]]
    axes.plot(trace["x"], trace["y"], color=colour(trace["line"]["color"]), drawstyle=steps, label=trace["name"])


def _bars(axes: Axes, trace: Trace, stacked: dict[Any, float], number: int, beside: int) -> None:
    paint = colour(trace["marker"]["color"])
    if trace.get("orientation") == "h":
        left = [stacked.get(name, 0.0) for name in trace["y"]]
        axes.barh(trace["y"], trace["x"], left=left, color=paint, label=trace["name"], height=0.62)
        stacked.update({name: start + own for name, start, own in zip(trace["y"], left, trace["x"], strict=True)})
    else:
        width = 0.8 / beside
        at = [x - 0.4 + width * (number + 0.5) for x in trace["x"]]
        axes.bar(at, trace["y"], width=width, color=paint, label=trace["name"])


def _heat_map(axes: Axes, trace: Trace) -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("sequential", palette()["--sequential"].split(", "))
    values = np.array([[np.nan if value is None else value for value in row] for row in trace["z"]])
    axes.imshow(values, aspect="auto", cmap=scale, vmin=0, vmax=1)
    axes.set_yticks(range(len(trace["y"])), trace["y"])
    axes.set_xticks(range(len(trace["x"])), [str(layer) for layer in trace["x"]])


def _strip_rows(report: JobReport) -> list[sections.StripRow]:
    return [row for group in sections.strips(report).strips for row in group.rows]


def strips(part: SubFigure, report: JobReport, *, verified_only: bool = False) -> None:
    """Plans as rows of coloured cells, one a layer."""
    from matplotlib.patches import Patch, Rectangle

    axes = part.add_subplot()
    groups = sections.strips(report).strips
    rows = [row for group in (groups[:1] if verified_only else groups) for row in group.rows]
    for number, row in enumerate(rows):
        for layer, letter in enumerate(row.plan):
            axes.add_patch(
                Rectangle((layer, number + 0.12), 0.92, 0.76, color=colour(figures.COLOURS[letter]), linewidth=0)
            )
    layers = max((len(row.plan) for row in rows), default=1)
    axes.set_xlim(0, layers)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([number + 0.5 for number in range(len(rows))], [f"{row.label}  {row.text}" for row in rows])
    step = 1 if layers <= 16 else 5
    axes.set_xticks(
        [layer + 0.46 for layer in range(0, layers, step)], [str(layer) for layer in range(0, layers, step)]
    )
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    used = [letter for letter in LETTERS if any(letter in row.plan for row in rows)]
    handles = [Patch(color=colour(figures.COLOURS[letter]), label=Action.of(letter).label) for letter in used]
    axes.set_xlabel("decoder layer")
    part.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)


def colour(name: str) -> str:
    """The light theme's value of a colour's name."""
    return palette()[name]


def palette() -> dict[str, str]:
    """The light theme's colours, read from the page's style, so that page and print cannot drift apart."""
    style = (files("optimizer.reports") / "page" / "report.css").read_text(encoding="utf-8")
    light = style[: style.index("@media")]
    return {name: value.strip() for name, value in re.findall(r"(--[\w-]+):\s*([^;]+);", light)}
