"""Intervals and tests behind every published number: how sure it is, and whether a difference could be chance.

Several questions share an image and are therefore not independent; everything here resamples or counts by image
where that matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval ``[low, high]``."""

    low: float
    high: float


def wilson_interval(share: float, n: float, confidence: float) -> Interval:
    """Wilson's score interval for a share out of ``n`` (possibly effective, non-integer) trials.

    Raises ValueError for a share outside [0, 1] or ``n`` below 1. Source: Wilson (1927).
    """
    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"a share in [0, 1] of at least one trial is needed, not {share} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))  # rounding at 0 and 1


def effective_sample_size(scores: Sequence[float], groups: Sequence[str]) -> float:
    """Return how many independent samples are worth as much as these grouped ones; in [1, len(scores)].

    The variance of the mean is taken from the groups' totals (Kish's design effect), so that ten questions of one
    image which are all right or all wrong together count as one.
    """
    n = len(scores)
    mean = sum(scores) / n
    totals, _ = _group_totals([score - mean for score in scores], groups)
    independent = float(np.var(scores)) / n
    if len(totals) < 2 or independent <= 0:
        return float(n)
    clustered = float((totals**2).sum()) / n**2 * len(totals) / (len(totals) - 1)
    return float(min(n, max(1.0, n * independent / clustered))) if clustered > 0 else float(n)


def _group_totals(values: Sequence[float], groups: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per group the sum of its values and their number, in order of first appearance; both [groups]."""
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values but {len(groups)} group names")
    position: dict[str, int] = {}
    index = np.array([position.setdefault(group, len(position)) for group in groups], dtype=np.int64)
    totals = np.bincount(index, weights=np.asarray(values), minlength=len(position)).astype(np.float64)
    return totals, np.bincount(index, minlength=len(position)).astype(np.float64)


def bootstrap_difference(
    dense: Sequence[float], plan: Sequence[float], groups: Sequence[str], *, seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Draw the bootstrap distribution of the paired difference ``mean(plan) - mean(dense)``, sorted; [resamples].

    ``groups`` names each sample's image; whole images are drawn with replacement. Two images of one question each
    are added, one lost and one gained, so that a plan which agreed on every sample still gets an interval of the
    width that its sample size deserves (Agresti and Min's adjustment) instead of none.
    """
    if len(dense) != len(plan) or len(dense) == 0:
        raise ValueError(f"the same samples are needed for both, not {len(dense)} and {len(plan)}")
    losses, sizes = _group_totals([d - p for d, p in zip(dense, plan, strict=True)], groups)
    losses = np.concatenate([losses, [1.0, -1.0]])
    sizes = np.concatenate([sizes, [1.0, 1.0]])
    # Images with the same loss and number of questions are interchangeable, so their kinds are drawn, not they.
    kinds, counts = np.unique(np.stack([losses, sizes]), axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for start in range(0, resamples, 500):  # in pieces: all resamples at once may not fit into memory
        rows = min(500, resamples - start)
        weights = generator.multinomial(len(losses), counts / len(losses), size=rows)
        drawn[start : start + rows] = (weights @ kinds[0]) / (weights @ kinds[1])
    return -np.sort(drawn)[::-1]


def difference_interval(differences: NDArray[np.float64], confidence: float) -> Interval:
    """Return the central ``confidence`` share of a distribution of :func:`bootstrap_difference`."""
    # Quantiles of the losses, with the sign turned: interpolation rounds differently from the other side.
    losses = two_sided(-differences[::-1], confidence)
    return Interval(-losses.high, -losses.low)


def two_sided(distribution: NDArray[np.float64], confidence: float) -> Interval:
    """Return the central ``confidence`` share of a bootstrap distribution."""
    tail = (1 - confidence) / 2
    return Interval(float(np.quantile(distribution, tail)), float(np.quantile(distribution, 1 - tail)))


def mcnemar_exact(dense: Sequence[float], plan: Sequence[float]) -> float:
    """Two-sided exact p-value that the two score equally often better than the other on a sample.

    For scores of 0 and 1 this is McNemar's exact test; for graded scores it is the sign test on the differences.
    """
    better = sum(bool(p > d) for d, p in zip(dense, plan, strict=True))
    worse = sum(bool(p < d) for d, p in zip(dense, plan, strict=True))
    n = better + worse
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / (1 << n))  # a ratio of integers: 2.0**n would leave the range of floats


def holm_confidences(evidence: Sequence[float], confidence: float) -> list[float]:
    """Per hypothesis the confidence its interval is judged at, so that all judgements together hold at ``confidence``.

    ``evidence`` orders the hypotheses, the smallest p-value first in line for the strictest level (Holm, 1979). A
    judgement that fails ends the line: the caller must reject all later ones too.
    """
    order = sorted(range(len(evidence)), key=lambda index: (evidence[index], index))
    levels = [0.0] * len(evidence)
    for rank, index in enumerate(order):
        levels[index] = 1 - (1 - confidence) / (len(evidence) - rank)
    return levels
