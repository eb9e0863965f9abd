"""Plans as rows of 0 and 1: one column for every (layer, action) other than running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optimizer.search.space import RUN

Floats = NDArray[np.float64]

WINDOW = 4
"""Layers that a local pair term may span."""
KIN_LAYERS = 3.0
"""Over so many layers the likeness of neighbours fades by a factor e; half of it is common to all layers."""


@dataclass(frozen=True)
class Encoding:
    """Columns of a space whose layers take the given letters (``R`` first); a compensated skip is the letter ``C``.

    A text over these letters is a plan together with whether its skips are compensated: either all of its skips are
    written ``S`` or all are written ``C``.
    """

    letters: tuple[str, ...]

    @cached_property
    def columns(self) -> tuple[tuple[int, str], ...]:
        """Layer and letter of every column."""
        return tuple((layer, letter) for layer, own in enumerate(self.letters) for letter in own if letter != RUN)

    @cached_property
    def _codes(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return (
            np.array([ord(letter) for _, letter in self.columns], dtype=np.uint8),
            np.array([layer for layer, _ in self.columns], dtype=np.int64),
        )

    def encode(self, texts: Sequence[str]) -> Floats:
        """Rows for texts; [texts, columns]."""
        codes, layers = self._codes
        if not texts:
            return np.zeros((0, len(codes)))
        table = np.frombuffer("".join(texts).encode(), dtype=np.uint8).reshape(len(texts), -1)
        rows: Floats = (table[:, layers] == codes).astype(np.float64)
        return rows

    @cached_property
    def kinship(self) -> Floats:
        """Correlation of what the same action does to two layers; 0 for different actions; [columns, columns]."""
        layers, letters = self._codes[1], self._codes[0]
        apart = np.abs(layers[:, None] - layers[None, :])
        alike: Floats = np.where(letters[:, None] == letters[None, :], (1.0 + np.exp(-apart / KIN_LAYERS)) / 2, 0.0)
        return alike

    @cached_property
    def kinship_factor(self) -> Floats:
        """Cholesky factor of ``kinship``."""
        return np.asarray(np.linalg.cholesky(self.kinship), dtype=np.float64)

    @cached_property
    def windows(self) -> tuple[NDArray[np.int64], ...]:
        """Columns of every stretch of ``WINDOW`` layers, at half-overlapping steps."""
        layers = self._codes[1]
        last = max(1, len(self.letters) - WINDOW // 2)
        stretches = [np.flatnonzero((layers >= at) & (layers < at + WINDOW)) for at in range(0, last, WINDOW // 2)]
        return tuple(stretch for stretch in stretches if len(stretch) > 1)

    @cached_property
    def window_counts(self) -> Floats:
        """In how many windows a column stands; [columns]."""
        counts = np.zeros(len(self.columns))
        for stretch in self.windows:
            counts[stretch] += 1.0
        return counts

    @cached_property
    def shared_windows(self) -> Floats:
        """In how many windows two columns stand together; [columns, columns]."""
        shared = np.zeros((len(self.columns), len(self.columns)))
        for stretch in self.windows:
            shared[np.ix_(stretch, stretch)] += 1.0
        return shared
