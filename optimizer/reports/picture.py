"""Draw the report's charts as pictures for print, by matplotlib from the same data as the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from optimizer.errors import UsageFault
from optimizer.reports import figures, formatting, latency, sections, theory
from optimizer.reports.chart import COLOURS, Chart, Trace
from optimizer.reports.data import JobReport, collect
from optimizer.reports.html import search_curves
from optimizer.reports.parts import StripRow
from storage.database import Database
from workers.runtime.plan import LETTERS, Action

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH_INCHES = 8.0
DOTS_PER_INCH = 200
MARKERS = {"circle": "o", "diamond": "D", "diamond-open": "D", "cross": "P"}


def write_picture(db: Database, job_id: int, name: str) -> bytes:
    """One of a job's charts as PNG. Raises NotFound, or UsageFault when there is nothing to draw or no matplotlib."""
    figure_class({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    report = collect(db, job_id)
    groups = sections.strips(report).strips
    if name == "plans":
        rows = [row for group in groups for row in group.rows]
        return _drawn([(0.8 + 0.3 * max(1, len(rows)), lambda part: strips(part, rows))])
    chart = _chart(db, report, name)
    if chart is None:
        raise UsageFault(f"job {job_id}: {name} was {formatting.NOT_MEASURED}, so there is nothing to draw")
    if name == "front" and report.plans:

        def titled(part: SubFigure) -> None:
            part.suptitle(f"{report.model_name} on {report.task_name}", x=0.02, ha="left", fontweight="bold")
            draw(part, chart)

        below = 0.9 + 0.25 * len(report.plans)
        return _drawn([(4.3, titled), (below, lambda part: strips(part, groups[0].rows))])
    return _drawn([(chart.height / 100, lambda part: draw(part, chart))])


def figure_class(style: Any) -> type[Figure]:
    """Load matplotlib with a style, without a display. Raises UsageFault where it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageFault("pictures need matplotlib: pip install 'skipplan[figures]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(style)
    return Figure


def _chart(db: Database, report: JobReport, name: str) -> Chart | None:
    if name == "front":
        return figures.front(report)
    if name == "redundancy":
        return figures.redundancy(report.redundancy)
    if name == "progress":
        return figures.progress(search_curves(db, report), report)
    if name == "latency":
        return latency.breakdown(report)
    found = theory.check(report)
    return None if found is None or not found.plans.pairs else figures.theory(found)


def _drawn(parts: Sequence[tuple[float, Callable[[SubFigure], None]]]) -> bytes:
    """Draw parts, each with its height in inches, under each other."""
    from matplotlib.figure import Figure

    heights = [height for height, _ in parts]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(parts), squeeze=False, height_ratios=heights)
    for (axes,), (_, draw_on) in zip(rows, parts, strict=True):
        draw_on(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": "skipplan"})
    return buffer.getvalue()


def draw(part: SubFigure, chart: Chart) -> None:
    """Draw every trace of a chart, with its axes and legend."""
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
    if "error_x" in trace:
        across, upwards = ([trace[axis]["arrayminus"], trace[axis]["array"]] for axis in ("error_x", "error_y"))
        bars: dict[str, Any] = {"fmt": "none", "ecolor": paint, "elinewidth": 1, "capsize": 2.5}
        axes.errorbar(trace["x"], trace["y"], xerr=across, yerr=upwards, **bars)
    style: dict[str, Any] = {"facecolors": "none" if hollow else paint, "edgecolors": paint if hollow else "none"}
    shape, size = MARKERS[marker.get("symbol", "circle")], (0.75 * marker["size"]) ** 2
    opacity = marker.get("opacity", 1.0)
    axes.scatter(trace["x"], trace["y"], size, marker=shape, alpha=opacity, label=trace["name"], zorder=3, **style)


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


def strips(part: SubFigure, rows: Sequence[StripRow]) -> None:
    """Draw plans as rows of coloured cells, one a layer."""
    from matplotlib.patches import Patch, Rectangle

    axes = part.add_subplot()
    for number, row in enumerate(rows):
        for layer, letter in enumerate(row.plan):
            corner = (layer, number + 0.12)
            axes.add_patch(Rectangle(corner, 0.92, 0.76, color=colour(COLOURS[letter]), linewidth=0))
    layers = max((len(row.plan) for row in rows), default=1)
    axes.set_xlim(0, layers)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([number + 0.5 for number in range(len(rows))], [f"{row.label}  {row.text}" for row in rows])
    marked = range(0, layers, 1 if layers <= 16 else 5)
    axes.set_xticks([layer + 0.46 for layer in marked], [str(layer) for layer in marked])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    used = [letter for letter in LETTERS if any(letter in row.plan for row in rows)]
    handles = [Patch(color=colour(COLOURS[letter]), label=Action.of(letter).label) for letter in used]
    axes.set_xlabel("decoder layer")
    part.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)


def colour(name: str) -> str:
    """Return the light theme's value of a colour's name."""
    return palette()[name]


def palette() -> dict[str, str]:
    """Return the light theme's colours, read from the page's style, so that page and print cannot drift apart."""
    style = (files("optimizer.reports") / "page" / "report.css").read_text(encoding="utf-8")
    light = style[: style.index("@media")]
    return {name: value.strip() for name, value in re.findall(r"(--[\w-]+):\s*([^;]+);", light)}
