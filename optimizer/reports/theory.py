"""Whether the criterion foresaw the harm: predicted risk of the plans tried against the loss that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.errors import UsageFault
from optimizer.reports.data import JobReport
from workers.errors import MeasurementError
from workers.messages import NO_COMPENSATION
from workers.redundancy.kinds import INTERVENTIONS
from workers.redundancy.table import LayerMeasurement, LayerTable
from workers.runtime.plan import Action

BEFORE_CRITERIA = "cosine"
"""What jobs went by that name no criterion: the only one there was."""
FEWEST_PAIRS = 4
"""With fewer a rank correlation says nothing."""


@dataclass(frozen=True)
class Pair:
    """What was predicted (risk, no unit) and what was measured (points of accuracy, or nats of divergence)."""

    label: str
    """The plan's text, or the layer's number."""
    predicted: float
    measured: float


@dataclass(frozen=True)
class Agreement:
    """Pairs with Spearman's rank correlation and its interval (95 %)."""

    pairs: tuple[Pair, ...]
    rho: float | None
    """None where ranks cannot be compared: too few pairs, or all measured the same."""
    low: float | None
    high: float | None

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Agreement:
        """Correlate; pairs without a finite prediction (a layer that could not be measured) are left out."""
        finite = tuple(pair for pair in pairs if math.isfinite(pair.predicted))
        rho, low, high = rank_correlation([pair.predicted for pair in finite], [pair.measured for pair in finite])
        return cls(finite, rho, low, high)


@dataclass(frozen=True)
class TheoryCheck:
    """How one criterion's predictions compare with measured harm."""

    criterion: str
    plans: Agreement
    """Predicted risk of each plan (the sum over its layers) against its loss of accuracy in points."""
    layers: dict[str, Agreement]
    """By letter, each layer's risk against the divergence that the action alone causes at it (KL, nats), where that
    was measured and is not itself the prediction."""


def check(report: JobReport) -> TheoryCheck | None:
    """Compare; None where the criterion's measurements are not stored."""
    if report.model is None:
        return None
    table = layer_table(report)
    name = report.spec.criterion or BEFORE_CRITERIA
    try:
        criterion = criteria.load(name, report.spec.thresholds)
        risk = criterion.risk(table)
    except (MeasurementError, UsageFault):
        return None
    plans = [
        Pair(each.plan, sum(risk.of(layer, letter) for layer, letter in enumerate(each.plan)), 100 * each.drop)
        for each in report.tried
        if each.complete
        and each.drop is not None
        and each.compensation == NO_COMPENSATION
        and _foreseen(risk, each.plan)
    ]
    causal = "causal" in criterion.needs
    return TheoryCheck(criterion.name, Agreement.of(plans), {} if causal else _layer_agreements(table, risk))


def layer_table(report: JobReport) -> LayerTable:
    """The stored measurements as criteria read them."""
    rows = tuple(
        LayerMeasurement(each.name, each.token_group, each.layer, each.value, each.standard_error, each.n)
        for each in report.redundancy
    )
    return LayerTable(report.num_layers or 0, rows)


def _foreseen(risk: Risk, plan: str) -> bool:
    return set(plan) <= {Action.RUN.letter, *risk.risk}


def _layer_agreements(table: LayerTable, risk: Risk) -> dict[str, Agreement]:
    found: dict[str, Agreement] = {}
    for action in INTERVENTIONS:
        letter = action.letter
        rows = [table.row(f"layer_contribution@{action.label}", "last", layer) for layer in range(table.num_layers)]
        pairs = [Pair(str(row.layer), risk.of(row.layer, letter), row.value) for row in rows if row is not None]
        if pairs and letter in risk.risk:
            found[letter] = Agreement.of(pairs)
    return found


def rank_correlation(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float | None, float | None, float | None]:
    """Spearman's rho (ties share their mean rank) and its interval of 95 %, taking the pairs as independent.

    None for all three when there are fewer than ``FEWEST_PAIRS`` pairs or one side is constant. Source of the interval:
    Bonett and Wright (2000), Fisher's transformation with standard error sqrt((1 + rho^2 / 2) / (n - 3)).
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    rho = None if len(x) < FEWEST_PAIRS else _rho(x, y)
    if rho is None:
        return None, None, None
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    half = NormalDist().inv_cdf(0.975) * math.sqrt((1 + rho * rho / 2) / (len(x) - 3))
    return rho, math.tanh(centre - half), math.tanh(centre + half)


def _rho(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    ranks_x, ranks_y = rankdata(x), rankdata(y)
    spread = float(ranks_x.std() * ranks_y.std())
    if spread == 0.0:
        return None
    return float(((ranks_x - ranks_x.mean()) * (ranks_y - ranks_y.mean())).mean() / spread)
