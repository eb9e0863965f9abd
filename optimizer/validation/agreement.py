"""Rank correlation of predicted risk with measured harm over layers, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from optimizer.verification.statistics import Interval, two_sided

Floats = NDArray[np.float64]

RESAMPLES = 4000
FEWEST_LAYERS = 4
"""With fewer layers a rank correlation says nothing."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's rho between predicted risk and measured harm, its interval, and what that says.

    ``rho`` is None where ranks cannot be compared: too few layers, or the same risk or harm at all of them.
    """

    rho: float | None
    low: float | None
    high: float | None
    layers: int
    verdict: str

    @classmethod
    def of(cls, risk: Sequence[float], harm: Floats, images: Sequence[str], confidence: float, seed: int) -> Agreement:
        """Compare ``risk`` ``[layers]`` with the mean of ``harm`` ``[layers, samples]``.

        The interval is for other layers and other images alike: both are drawn anew, with replacement.
        """
        values, layers = np.asarray(risk, dtype=np.float64), len(risk)
        rho = spearman(values, harm.mean(1)) if layers >= FEWEST_LAYERS else None
        if rho is None:
            return cls(None, None, None, layers, "cannot be said")
        drawn = _resampled(values, harm, images, seed)
        interval = two_sided(drawn, confidence)
        return cls(rho, interval.low, interval.high, layers, verdict(interval))


def verdict(interval: Interval) -> str:
    """What an interval of rho says about a criterion."""
    if interval.low > 0:
        return "predicts harm"
    if interval.high < 0:
        return "predicts the opposite"
    return "does not predict harm"


def spearman(first: Floats, second: Floats) -> float | None:
    """Spearman's rho, ties at their mean rank; None when all values of one are equal."""
    found = _rank_correlations(first[None], second[None])
    return None if np.isnan(found[0]) else float(found[0])


def _rank_correlations(first: Floats, second: Floats) -> Floats:
    """Per row of ``[rows, layers]`` the rank correlation; NaN where a row is constant."""
    ranks = [rankdata(each, axis=1) for each in (first, second)]
    centred = [each - each.mean(1, keepdims=True) for each in ranks]
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Floats = (centred[0] * centred[1]).sum(1) / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return rho


def _resampled(risk: Floats, harm: Floats, images: Sequence[str], seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    names, owner = np.unique(np.asarray(images), return_inverse=True)
    totals = np.zeros((len(harm), len(names)))
    np.add.at(totals.T, owner, harm.T)
    sizes = np.bincount(owner, minlength=len(names))
    weights = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    means = weights @ totals.T / (weights @ sizes)[:, None]  # [resamples, layers]
    layers = generator.integers(0, len(risk), size=(RESAMPLES, len(risk)))
    found = _rank_correlations(risk[layers], np.take_along_axis(means, layers, axis=1))
    # A resample in which all layers do the same harm shows no agreement. Leaving it out would count only those that
    # hold the one layer that matters, and make a narrow interval of nothing.
    return np.sort(np.nan_to_num(found, nan=0.0))
