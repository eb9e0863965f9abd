"""Format the validation report and the table of measurements as tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from typing import Any

from rich.table import Table

from optimizer.criteria import Risk
from optimizer.reports.formatting import span
from optimizer.statistics.rank_agreement import Agreement
from optimizer.validation.report import ValidationReport, finite
from workers.redundancy.kinds import OPERATORS
from workers.redundancy.table import LayerMeasurement, LayerTable
from workers.runtime.plan import Action

LAYER_COLUMNS = (
    ("d vision", "cosine_distance", "vision"),
    ("d text", "cosine_distance", "text"),
    ("d last", "cosine_distance", "last"),
    ("P(d>0.1) V", "cosine_distance_tail@0.1", "vision"),
    ("d attention V", "operator_distance@attention", "vision"),
    ("d attention T", "operator_distance@attention", "text"),
    ("d MLP V", "operator_distance@mlp", "vision"),
    ("d MLP T", "operator_distance@mlp", "text"),
    ("attention on V", "vision_attention", "text"),
    ("1-CKA V", "cka", "vision"),
    ("1-CKA T", "cka", "text"),
    ("gain", "propagation_gain", "all"),
    ("d at top", "final_distance", "last"),
    ("probe gap", "functional_gap", "last"),
    ("info gap", "information_gap", "last"),
    ("KL removed", "final_divergence", "answer"),
    ("KL freeze, tried", "trial_divergence@freeze", "answer"),
    ("KL bypass, tried", "trial_divergence@bypass", "answer"),
    ("KL skip, tried", "trial_divergence@skip", "answer"),
    ("KL freeze", "layer_contribution@freeze", "answer"),
    ("KL bypass", "layer_contribution@bypass", "answer"),
    ("KL skip", "layer_contribution@skip", "answer"),
    *((f"KL {each.label}", f"layer_contribution@{each.label}", "answer") for each in OPERATORS),
    ("KL withdrawn, first token", "withdrawal", "last"),
)
"""Heading, name and group of the measurements that the per-layer table shows; JSON and CSV hold all of them."""


def layer_columns(table: LayerTable) -> list[tuple[str, tuple[float, ...]]]:
    """Heading and values of every column that was measured; NaN where a layer has none. CKA is turned into 1 - CKA."""
    found = []
    for heading, name, group in LAYER_COLUMNS:
        if table.has(name, group):
            values = table.values(name, group, default=math.nan)
            found.append((heading, tuple(1 - value for value in values) if name == "cka" else values))
    return found


def layers_table(table: LayerTable, risk: Risk) -> Table:
    """One row a layer: what was measured, and the risk that the criterion predicts for each action."""
    columns = layer_columns(table)
    drawn = Table(title=f"Layers, and the risk that {risk.criterion} predicts", title_justify="left")
    for heading in ("layer", *(heading for heading, _ in columns)):
        drawn.add_column(heading, justify="right")
    for letter in risk.risk:
        drawn.add_column(f"risk {Action.of(letter).label}", justify="right", style="bold")
    for layer in range(table.num_layers):
        values = [values[layer] for _, values in columns] + [risk.of(layer, letter) for letter in risk.risk]
        drawn.add_row(str(layer), *map(number, values))
    return drawn


def number(value: float | None) -> str:
    """Three digits that count; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    return "inf" if math.isinf(value) else f"{value:.3g}"


def measurements_json(table: LayerTable, risk: Risk) -> dict[str, Any]:
    """Every measurement and the predicted risks, as plain values."""
    return {
        "criterion": risk.criterion,
        "layers": table.num_layers,
        "risk": {Action.of(letter).label: finite(values) for letter, values in risk.risk.items()},
        "measurements": [asdict(row) for row in _sorted(table)],
    }


def _sorted(table: LayerTable) -> list[LayerMeasurement]:
    """Sort measurements by name, token group and layer, whether they were just made or read from the database."""
    return sorted(table.rows, key=lambda row: (row.name, row.token_group, row.layer))


def measurements_csv(table: LayerTable) -> str:
    """Every measurement, one a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(LayerMeasurement)])
    writer.writerows(astuple(row) for row in _sorted(table))
    return text.getvalue()


def validation_tables(report: ValidationReport) -> Iterator[Table]:
    """Rank correlations, sets of layers, overlaps, the paper's claims."""
    yield _correlations(report)
    yield _sets(report)
    yield _overlaps(report)
    yield _conditions(report)
    yield _claims(report)


def _correlations(report: ValidationReport) -> Table:
    title = (
        f"Spearman's rho of predicted risk (calibration, n = {report.calibration_samples}) with measured harm "
        f"(held out, n = {report.held_out_samples}) over layers, {report.confidence:.0%} interval"
    )
    headings = ("action", "criterion", "with KL", "with loss of accuracy", "verdict (KL, else accuracy)")
    drawn = Table(*headings, title=title, title_justify="left")
    for action in report.actions:
        for name in action.risks:
            by_kl, by_accuracy = action.by_kl.get(name), action.by_accuracy[name]
            style = "bold" if name == report.criterion else None
            verdict = (by_kl or by_accuracy).verdict
            drawn.add_row(action.action, name, agreement(by_kl), agreement(by_accuracy), verdict, style=style)
        drawn.add_section()
    return drawn


def agreement(found: Agreement | None) -> str:
    """Rho and its interval."""
    if found is None or found.rho is None or found.low is None or found.high is None:
        return "-"
    return span(found.rho, found.low, found.high, "+.2f")


def _sets(report: ValidationReport) -> Table:
    title = (
        f"{report.set_size} layers at once, chosen on calibration samples, tried on held-out ones "
        f"(dense {report.dense_accuracy:.3f})"
    )
    headings = ("action", "chosen by", "layers", "accuracy", "difference to dense (points)", "KL")
    drawn = Table(*headings, title=title, title_justify="left")
    for each in report.sets:
        name = {"safe": f"{report.criterion}: safest", "unsafe": f"{report.criterion}: riskiest"}.get(
            each.kind, each.kind
        )
        layers = " ".join(map(str, each.layers))
        action = Action.of(each.action).label
        if each.harm is None:
            drawn.add_row(action, name, layers, "cannot be run", "-", "-")
            continue
        harm = each.harm
        points = (100 * harm.difference, 100 * harm.difference_low, 100 * harm.difference_high)
        difference = span(*points, "+.1f")
        drawn.add_row(action, name, layers, f"{each.harm.accuracy:.3f}", difference, number(each.harm.kl))
    return drawn


def _overlaps(report: ValidationReport) -> Table:
    title = f"Of the layers a published method takes, how many are among the safest of {report.criterion}"
    drawn = Table("action", "method", "shared", "by chance", title=title, title_justify="left")
    for each in report.overlaps:
        drawn.add_row(
            Action.of(each.action).label, each.method, f"{each.shared} of {each.size}", f"{each.expected:.1f}"
        )
    return drawn


def _conditions(report: ValidationReport) -> Table:
    title = "Bypass at single layers by its two conditions, each split at its median: geometric mean of the KL"
    drawn = Table("redundant", "little attention", "layers", "KL", title=title, title_justify="left")
    for cell in report.conditions:
        interval = "" if cell.low is None else f" [{number(cell.low)}, {number(cell.high)}]"
        harm = "-" if cell.kl is None else f"{number(cell.kl)}{interval}"
        layers = " ".join(map(str, cell.layers)) or "-"
        drawn.add_row(*("yes" if each else "no" for each in (cell.redundant, cell.little_attention)), layers, harm)
    return drawn


def _claims(report: ValidationReport) -> Table:
    drawn = Table("claim", "answer", "evidence", "rule", title="Claims of the paper", title_justify="left")
    for each in report.claims:
        drawn.add_row(each.claim, each.answer, each.evidence, each.rule, end_section=True)
    return drawn
