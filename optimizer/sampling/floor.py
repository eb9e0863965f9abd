"""Harm mostly grows with what is left out: a plan is taken to harm no less than a known plan that it contains."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optimizer.sampling.encoding import Encoding

Floats = NDArray[np.float64]


class Floor:
    """The most harm among known plans of which a plan does everything, or more of it at the same layers."""

    def __init__(self, encoding: Encoding, rows: Floats, harm: Floats) -> None:
        """``rows`` [plans, columns] and ``harm`` [plans] of the known plans; the dense one among them says nothing."""
        touched = rows.sum(axis=1)
        some = touched > 0
        self._needed = encoding.at_least @ rows[some].T
        self._touched, self._harm = touched[some], harm[some]

    def __call__(self, rows: Floats) -> Floats:
        """[plans]; minus infinity for a plan that contains no known one."""
        if not len(self._harm):
            return np.full(len(rows), -np.inf)
        contains = rows @ self._needed >= self._touched - 0.5
        floor: Floats = np.where(contains, self._harm, -np.inf).max(axis=1)
        return floor
