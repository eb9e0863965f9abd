"""Linear redundancy: what no linear map of the MLP before a layer can explain of the state behind it (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, everywhere


@dataclass(frozen=True)
class LinearRedundancy:
    """The predicted harm of skipping one layer with compensation; runs of layers are rated by the seeds themselves."""

    name = "linear-redundancy"
    source = "skipplan, docs/compensation.md"
    needs = ("linear",)
    published_for = Action.SKIP.letter

    @property
    def thresholds(self) -> Mapping[str, float]:
        """None."""
        return {}

    def risk(self, table: LayerTable) -> Risk:
        """The share left unexplained behind each layer, by a map of the layer before it; none stands before layer 0."""
        default = math.inf if table.has("linear_redundancy@1", "all") else None
        before = table.values("linear_redundancy@1", "all", default=default)
        return everywhere(self.name, (math.inf, *before[:-1]))
