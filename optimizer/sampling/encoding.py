"""Plans as rows of 0 and 1: one column for every (layer, action) other than running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW = 4
"""Layers that a local pair term may span."""


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
        return tuple((layer, letter) for layer, own in enumerate(self.letters) for letter in own if letter != "R")

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
    def windows(self) -> tuple[NDArray[np.int64], ...]:
        """Columns of every stretch of ``WINDOW`` layers, at half-overlapping steps."""
        layers = self._codes[1]
        last = max(1, len(self.letters) - WINDOW // 2)
        stretches = [np.flatnonzero((layers >= at) & (layers < at + WINDOW)) for at in range(0, last, WINDOW // 2)]
        return tuple(stretch for stretch in stretches if len(stretch) > 1)

    @cached_property
    def shared_windows(self) -> Floats:
        """In how many windows two columns stand together; [columns, columns]."""
        shared = np.zeros((len(self.columns), len(self.columns)))
        for stretch in self.windows:
            shared[np.ix_(stretch, stretch)] += 1.0
        return shared
