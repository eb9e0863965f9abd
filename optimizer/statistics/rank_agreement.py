"""Rank agreement of predicted risk with measured harm, over plans or layers, and what it says about a criterion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from optimizer.statistics.intervals import Interval, two_sided

Floats = NDArray[np.float64]

RESAMPLES = 4000
FEWEST_PAIRS = 4
"""With fewer pairs a rank correlation says nothing."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's rho between predicted risk and measured harm, its interval, and what that says.

    ``rho`` is None where ranks cannot be compared: too few pairs, or the same risk or harm in all of them.
    """

    rho: float | None
    low: float | None
    high: float | None
    pairs: int
    verdict: str

    @classmethod
    def of_pairs(cls, risk: Sequence[float], harm: Sequence[float], confidence: float = 0.95) -> Agreement:
        """Compare pairs, taking them as independent.

        Source of the interval: Bonett and Wright (2000), Fisher's transformation with standard error
        sqrt((1 + rho^2 / 2) / (n - 3)).
        """
        rho = spearman(np.asarray(risk, dtype=np.float64), np.asarray(harm, dtype=np.float64))
        if rho is None:
            return cls._unknown(len(risk))
        centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
        half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((1 + rho * rho / 2) / (len(risk) - 3))
        return cls._with(rho, Interval(math.tanh(centre - half), math.tanh(centre + half)), len(risk))

    @classmethod
    def over_layers(
        cls, risk: Sequence[float], harm: Floats, images: Sequence[str], confidence: float, seed: int
    ) -> Agreement:
        """Compare ``risk`` ``[layers]`` with the mean of ``harm`` ``[layers, samples]``.

        The interval is for other layers and other images alike: both are drawn anew, with replacement.
        """
        values = np.asarray(risk, dtype=np.float64)
        rho = spearman(values, harm.mean(1))
        if rho is None:
            return cls._unknown(len(risk))
        return cls._with(rho, two_sided(resampled(values, harm, images, seed), confidence), len(risk))

    @classmethod
    def _unknown(cls, pairs: int) -> Agreement:
        return cls(None, None, None, pairs, "cannot be said")

    @classmethod
    def _with(cls, rho: float, interval: Interval, pairs: int) -> Agreement:
        return cls(rho, interval.low, interval.high, pairs, verdict(interval))


def verdict(interval: Interval) -> str:
    """Say what an interval of rho tells about a criterion."""
    if interval.low > 0:
        return "predicts harm"
    if interval.high < 0:
        return "predicts the opposite"
    return "does not predict harm"


def spearman(first: Floats, second: Floats) -> float | None:
    """Spearman's rho of two rows ``[pairs]``, ties at their mean rank.

    None for fewer than ``FEWEST_PAIRS`` pairs, or when all values of one row are equal.
    """
    if len(first) < FEWEST_PAIRS:
        return None
    found = rank_correlations(first[None], second[None])
    return None if np.isnan(found[0]) else float(found[0])


def rank_correlations(first: Floats, second: Floats) -> Floats:
    """Spearman's rho of each row of ``[rows, pairs]``; NaN where a row is constant."""
    from scipy.stats import rankdata  # takes a second to import, and most commands rank nothing

    ranks = [rankdata(each, axis=1) for each in (first, second)]
    centred = [each - each.mean(1, keepdims=True) for each in ranks]
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Floats = (centred[0] * centred[1]).sum(1) / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return rho


def resampled(risk: Floats, harm: Floats, images: Sequence[str], seed: int) -> Floats:
    """Draw layers and images anew: Spearman's rho of each draw, ``[RESAMPLES]``.

    ``risk`` is ``[layers]``, ``harm`` ``[layers, samples]``. The same seed draws the same ones, so that two criteria
    can be compared draw by draw.
    """
    generator = np.random.default_rng(seed)
    names, owner = np.unique(np.asarray(images), return_inverse=True)
    totals = np.zeros((len(harm), len(names)))
    np.add.at(totals.T, owner, harm.T)
    sizes = np.bincount(owner, minlength=len(names))
    weights = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    means = weights @ totals.T / (weights @ sizes)[:, None]  # [resamples, layers]
    layers = generator.integers(0, len(risk), size=(RESAMPLES, len(risk)))
    found = rank_correlations(risk[layers], np.take_along_axis(means, layers, axis=1))
    # A resample in which all layers do the same harm shows no agreement. Leaving it out would count only those that
    # hold the one layer that matters, and make a narrow interval of nothing.
    return np.nan_to_num(found, nan=0.0)
