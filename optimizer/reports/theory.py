"""Compare the criterion's predicted risk of the plans tried with the loss that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.criteria.evidence import Evidence
from optimizer.errors import UsageFault
from optimizer.reports.data import JobReport
from optimizer.statistics.rank_agreement import Agreement
from workers.errors import MeasurementError
from workers.messages import NO_COMPENSATION
from workers.redundancy.kinds import ANSWER, INTERVENTIONS, OPERATORS
from workers.redundancy.table import LayerMeasurement, LayerTable
from workers.runtime.plan import Action

BEFORE_CRITERIA = "cosine"
"""Criterion of jobs that name none: the only one there was."""


@dataclass(frozen=True)
class Pair:
    """A predicted risk (no unit) and the measured harm (points of accuracy lost, or nats of divergence)."""

    label: str
    """The plan's text, or the layer's number."""
    predicted: float
    measured: float


@dataclass(frozen=True)
class Comparison:
    """Pairs of predicted and measured values, and how well their ranks agree (95 % interval)."""

    pairs: tuple[Pair, ...]
    agreement: Agreement

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Comparison:
        """Correlate; pairs without a finite prediction (a layer that could not be measured) are left out."""
        finite = tuple(pair for pair in pairs if math.isfinite(pair.predicted))
        return cls(finite, Agreement.of_pairs([each.predicted for each in finite], [each.measured for each in finite]))


@dataclass(frozen=True)
class TheoryCheck:
    """How one criterion's predictions compare with measured harm."""

    criterion: str
    plans: Comparison
    """Predicted risk of each plan (the sum over its layers) against its loss of accuracy in points."""
    evidence: Evidence | None
    """How its risk agreed with removals when the search began; None where that was not recorded."""
    layers: dict[str, Comparison]
    """By letter, each layer's risk against the divergence that the action alone causes at it (KL, nats), where that
    was measured and is not itself the prediction."""


def check(report: JobReport) -> TheoryCheck | None:
    """Compare; None where the criterion's measurements are not stored."""
    if report.model is None:
        return None
    table = LayerTable(report.model.num_layers, tuple(LayerMeasurement(**vars(each)) for each in report.redundancy))
    name = report.spec.criterion or BEFORE_CRITERIA
    try:
        criterion = criteria.load(name, report.spec.thresholds)
        risk = criterion.risk(table)
    except (MeasurementError, UsageFault):
        return None
    plans = [
        Pair(
            each.plan,
            sum(risk.of(layer, letter) for layer, letter in enumerate(each.plan)),
            0.0 - 100 * each.difference,  # no loss is 0.00, not -0.00
        )
        for each in report.trials
        if each.complete
        and each.difference is not None
        and each.compensation == NO_COMPENSATION
        and set(each.plan) <= {Action.RUN.letter, *risk.risk}
    ]
    reads_harm = {"causal", "trials"} & set(criterion.needs)
    by_layer = {} if reads_harm else _by_layer(table, risk)
    return TheoryCheck(criterion.name, Comparison.of(plans), report.evidence, by_layer)


def _by_layer(table: LayerTable, risk: Risk) -> dict[str, Comparison]:
    found: dict[str, Comparison] = {}
    for action in (*INTERVENTIONS, *OPERATORS):
        letter = action.letter
        rows = [table.row(f"layer_contribution@{action.label}", ANSWER, layer) for layer in range(table.num_layers)]
        pairs = [Pair(str(row.layer), risk.of(row.layer, letter), row.value) for row in rows if row is not None]
        if pairs and letter in risk.risk:
            found[letter] = Comparison.of(pairs)
    return found
