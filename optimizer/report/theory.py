"""Whether the criterion foresaw the harm: predicted risk of the plans tried against the loss that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from optimizer.criterion import CRITERIA, Redundancy, Risk
from optimizer.report.data import JobReport, Tried
from storage.measurements import Redundancy as Measurement

CRITERION = "geometric"
RESAMPLES = 2_000
FEWEST_PLANS = 4
"""With fewer plans a rank correlation says nothing."""


@dataclass(frozen=True)
class Prediction:
    """A plan, its predicted risk (sum over its layers) and the drop of accuracy that the search measured."""

    plan: str
    risk: float
    drop: float


@dataclass(frozen=True)
class TheoryCheck:
    """Predictions of one criterion, with Spearman's rank correlation and its bootstrap interval (95 %)."""

    criterion: str
    predictions: tuple[Prediction, ...]
    rho: float | None
    """None where ranks cannot be compared: too few plans, or all with the same drop."""
    low: float | None
    high: float | None


def check(report: JobReport) -> TheoryCheck | None:
    """Compare; None where no redundancy was measured or no plan was scored on the whole search split."""
    risk = predicted_risk(report.redundancy)
    if risk is None:
        return None
    predictions = tuple(
        Prediction(each.plan, plan_risk(risk, each.plan), each.drop) for each in _comparable(report.tried, risk)
    )
    if not predictions:
        return None
    rho, low, high = rank_correlation([p.risk for p in predictions], [p.drop for p in predictions])
    return TheoryCheck(risk.criterion, predictions, rho, low, high)


def predicted_risk(measurements: Sequence[Measurement]) -> Risk | None:
    """The criterion's risk from stored measurements; None where they lack what it needs."""
    distance: dict[str, dict[int, float]] = {}
    for each in measurements:
        if each.name == "cosine_distance":
            distance.setdefault(each.token_group, {})[each.layer] = each.value
    if not {"vision", "text"} <= distance.keys():
        return None
    layers = {group: tuple(values[layer] for layer in sorted(values)) for group, values in distance.items()}
    empty: dict[str, tuple[float | None, ...]] = {group: (None,) * len(values) for group, values in layers.items()}
    return CRITERIA[CRITERION](Redundancy(layers, empty, dict.fromkeys(layers, 0), 0))


def plan_risk(risk: Risk, plan: str) -> float:
    """Sum of the layers' risks: what an additive criterion says about a whole plan."""
    return float(sum(risk.risk[letter][layer] for layer, letter in enumerate(plan)))


@dataclass(frozen=True)
class _Comparable:
    plan: str
    drop: float


def _comparable(tried: Sequence[Tried], risk: Risk) -> list[_Comparable]:
    return [
        _Comparable(each.plan, each.drop)
        for each in tried
        if each.complete and each.drop is not None and each.compensation == "none" and set(each.plan) <= risk.risk.keys()
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Spearman's rho (ties share their mean rank) with a percentile bootstrap interval of 95 % over the pairs.

    None for all three when there are fewer than ``FEWEST_PLANS`` pairs or one side is constant. Source: Spearman (1904).
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    rho = _rho(x, y)
    if len(x) < FEWEST_PLANS or rho is None:
        return None, None, None
    generator = np.random.default_rng(0)
    if len(x) > 1_000:  # the interval of so many is narrow; a thousand pairs a resample bound the work
        chosen = generator.choice(len(x), 1_000, replace=False)
        x, y = x[chosen], y[chosen]
    resampled = [_rho(x[rows], y[rows]) for rows in generator.integers(0, len(x), (RESAMPLES, len(x)))]
    values = [value for value in resampled if value is not None]
    low, high = np.quantile(values, (0.025, 0.975))
    return rho, float(low), float(high)


def _rho(x: np.ndarray, y: np.ndarray) -> float | None:
    ranks_x, ranks_y = rankdata(x), rankdata(y)
    spread = float(ranks_x.std() * ranks_y.std())
    if spread == 0.0:
        return None
    return float(((ranks_x - ranks_x.mean()) * (ranks_y - ranks_y.mean())).mean() / spread)
