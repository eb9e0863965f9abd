"""Trust region of TuRBO on plans: how many layers a proposal may differ from a known good plan.

Far from the data the posterior is wide, so some Thompson draw is always optimistic there. Proposals are restricted to a
Hamming ball around plans known to meet the accuracy limit. Its radius grows after batches of which many meet the limit,
and shrinks after batches of which few do (Eriksson et al., arXiv 1910.01465; on categories Wan et al., arXiv
2102.07188).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optimizer.search.space import COMPENSATED, SKIP
from workers.runtime.plan import LETTERS

FEW, MANY = 0.25, 0.5
"""Shares of a batch that meet the limit, below and from which the radius changes."""


class TrustRegion:
    """Keep to plans (genomes) that differ from a good one in at most ``radius`` layers."""

    def __init__(self, layers: int, radius: int = 2) -> None:
        self._layers, self.radius = layers, radius

    def learn(self, good: Sequence[bool]) -> None:
        """Adapt the radius to whether each proposal of the last batch met the limit."""
        share = sum(good) / len(good)
        if share < FEW:
            self.radius = max(1, self.radius - 1)
        elif share >= MANY:
            self.radius = min(self._layers, self.radius + 1)

    def within(self, pool: Sequence[str], good: Sequence[str]) -> list[str]:
        """Return the genomes of a pool that are near one of the good ones, of which there must be some; in order."""
        return _up_to(pool, self._distances(pool, good), self.radius)

    def nearest(self, pool: Sequence[str], good: Sequence[str]) -> list[str]:
        """Return the same; where none is within the radius, the nearest ones. The radius itself does not change."""
        distances = self._distances(pool, good)
        return _up_to(pool, distances, max(self.radius, int(distances.min(initial=self._layers))))

    def _distances(self, pool: Sequence[str], good: Sequence[str]) -> NDArray[np.int64]:
        """In how many layers each genome differs from the good one that is nearest to it; [pool]."""
        equal = _one_hot(pool, self._layers) @ _one_hot(good, self._layers).T
        distances: NDArray[np.int64] = self._layers - equal.max(axis=1).round().astype(np.int64)
        return distances


def _up_to(pool: Sequence[str], distances: NDArray[np.int64], radius: int) -> list[str]:
    return [genome for genome, distance in zip(pool, distances, strict=True) if distance <= radius]


def _one_hot(genomes: Sequence[str], layers: int) -> NDArray[np.float32]:
    """[genomes, layers x letters]; a skip counts the same whether it is compensated or not."""
    text = "".join(genomes).replace(COMPENSATED, SKIP).encode()
    codes = np.frombuffer(text, dtype=np.uint8).reshape(len(genomes), layers)
    return np.concatenate([codes == ord(letter) for letter in LETTERS], axis=1).astype(np.float32)
