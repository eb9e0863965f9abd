"""Draw measurements and the validation report by matplotlib (extra ``figures``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.criteria import Risk
from optimizer.errors import UsageFault
from optimizer.reports.picture import figure_class
from optimizer.validation.report import ActionReport, ValidationReport
from optimizer.validation.tables import agreement, layer_columns
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
STYLE = {"font.size": 9, "svg.fonttype": "none"}


def check_picture(path: Path) -> None:
    """Refuse before any work is done what could not be drawn after it. Raises UsageFault."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageFault(f"{path}: pictures are drawn as {', '.join(SUFFIXES)}")
    figure_class(STYLE)


def heat_map(table: LayerTable, risk: Risk, title: str) -> Figure:
    """Layers from left to right, a row for every measurement and predicted risk, each scaled to its largest value."""
    rows = [*layer_columns(table), *((f"risk {Action.of(key).label}", values) for key, values in risk.risk.items())]
    finite = np.array([[value if math.isfinite(value) else np.nan for value in values] for _, values in rows])
    largest = np.nanmax(np.abs(finite), axis=1, keepdims=True, initial=1e-12, where=~np.isnan(finite))
    figure = figure_class(STYLE)(figsize=(3.2 + 0.42 * table.num_layers, 1.3 + 0.33 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(finite / largest, cmap="magma_r", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(table.num_layers), [str(layer) for layer in range(table.num_layers)])
    labels = [f"{name}  (max {peak:.2g})" for (name, _), peak in zip(rows, largest[:, 0], strict=True)]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("decoder layer")
    axes.set_title(title)
    figure.colorbar(drawn, label="share of the row's largest")
    return figure


def validation_figure(report: ValidationReport) -> Figure:
    """For every action the criterion's predicted risk against measured harm, and every criterion's rank correlation."""
    figure = figure_class(STYLE)(figsize=(4.6 * len(report.actions), 8.2), layout="constrained")
    for column, action in enumerate(report.actions):
        _scatter(figure.add_subplot(2, len(report.actions), column + 1), action, report)
        _intervals(figure.add_subplot(2, len(report.actions), len(report.actions) + column + 1), action, report)
    figure.suptitle(f"{report.model} on {report.task}: predicted on calibration, measured on held-out samples")
    return figure


def _scatter(axes: Any, action: ActionReport, report: ValidationReport) -> None:
    harm = action.kl if action.kl is not None else tuple(0.0 - 100 * difference for difference in action.difference)
    risk = action.risks[report.criterion]
    axes.scatter(risk, harm, s=14)
    for layer, x, y in zip(action.layers, risk, harm, strict=True):
        axes.annotate(str(layer), (x, y), fontsize=7, xytext=(2, 2), textcoords="offset points")
    if action.kl is not None:
        axes.set_yscale("symlog", linthresh=max(1e-9, min((value for value in harm if value > 0), default=1e-9)))
    positive = [value for value in risk if value > 0]
    if len(positive) == len(risk):
        axes.set_xscale("log")
    elif positive:  # some layers are predicted to do no harm at all
        axes.set_xscale("symlog", linthresh=min(positive))
    found = action.by_kl.get(report.criterion) or action.by_accuracy[report.criterion]
    axes.set_title(f"{action.action}: rho {agreement(found)}", fontsize=9)
    axes.set_xlabel(f"risk predicted by {report.criterion}")
    axes.set_ylabel("measured KL (nats)" if action.kl is not None else "measured loss (points)")


def _intervals(axes: Any, action: ActionReport, report: ValidationReport) -> None:
    found = action.by_kl or action.by_accuracy
    names = [name for name in found if found[name].rho is not None]
    for index, name in enumerate(names):
        each = found[name]
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [index, index], color="tab:blue" if name == report.criterion else "grey")
        axes.plot(each.rho, index, "o", color="tab:blue" if name == report.criterion else "grey", markersize=4)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.6)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel(
        f"Spearman's rho with {'KL' if action.by_kl else 'loss of accuracy'}, {report.confidence:.0%} interval"
    )
