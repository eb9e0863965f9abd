"""Hypervolume that candidates would add to a front of (latency ratio, accuracy drop), many candidates at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optimizer.search.pareto import Point, front_indices

Floats = NDArray[np.float64]


class Stairs:
    """The front as a falling step function: the smallest drop reached up to a latency ratio."""

    def __init__(self, points: Sequence[Point], reference: Point) -> None:
        inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
        front = [inside[index] for index in front_indices(inside)]
        self.reference = reference
        self._ratios = np.array([point[0] for point in front])
        self._starts = np.array([-np.inf, *self._ratios])
        self._ends = np.array([*self._ratios, reference[0]])
        self._levels = np.array([reference[1], *(point[1] for point in front)])
        self.lowest = float(self._levels[-1])

    def gain(self, ratios: Floats, drops: Floats) -> Floats:
        """Area added by each candidate alone; ``ratios`` [plans], ``drops`` [..., plans]."""
        width = np.clip(self._ends[:, None] - np.maximum(self._starts[:, None], ratios[None]), 0.0, None)
        height = np.clip(self._levels[:, None] - drops[..., None, :], 0.0, None)
        area: Floats = (width * height).sum(axis=-2)
        return area

    def excess(self, ratios: Floats, drops: Floats) -> Floats:
        """By how much a candidate's drop is above the front at its ratio (negative where it is below)."""
        step = np.searchsorted(self._ratios, ratios, side="right")
        above: Floats = drops - self._levels[step]
        return above
