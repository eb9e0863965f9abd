"""Angular distance at the last token (Gromov et al., arXiv 2403.17887): (1/pi) arccos cos(X_l, X_{l+n})."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, everywhere


@dataclass(frozen=True)
class Angular:
    """Published for removing one block of n layers: those after the l (0 included) that minimises the distance.

    ``block`` is n. A layer's risk is the smallest distance of a block of n layers that holds it, so that with n = 1
    it is the layer's own, and otherwise the best block comes first.
    """

    block: float = 1

    name = "angular"
    source = "Gromov et al., arXiv 2403.17887"
    needs = ("angular",)
    published_for = Action.SKIP.letter

    def __post_init__(self) -> None:
        if self.block < 1 or self.block != int(self.block):
            raise ValueError(f"block must be a whole number of layers, at least 1, not {self.block:g}")

    @property
    def thresholds(self) -> Mapping[str, float]:
        """The block's length."""
        return {"block": self.block}

    def risk(self, table: LayerTable) -> Risk:
        """See the class."""
        layers = table.num_layers
        length = min(int(self.block), layers)
        name = f"angular_distance@{length}"
        starts = table.values(name, "last", default=math.inf if table.has(name, "last") else None)
        values = tuple(min(starts[max(0, layer - length + 1) : layer + 1]) for layer in range(layers))
        return everywhere(self.name, values)

    def best_block(self, table: LayerTable, length: int) -> range:
        """The ``length`` layers that the method removes."""
        found = [
            (row.value, start)
            for start in range(table.num_layers - length + 1)
            if (row := table.row(f"angular_distance@{length}", "last", start)) is not None
        ]
        _, start = min(found)
        return range(start, start + length)
