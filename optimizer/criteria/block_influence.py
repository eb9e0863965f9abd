"""Block Influence (Men et al., "ShortGPT", arXiv 2403.03853): 1 - E cos(X_{l-1}, X_l) over all tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, everywhere


@dataclass(frozen=True)
class BlockInfluence:
    """Published for removing layers; the same number serves the other actions here."""

    name = "block-influence"
    source = "ShortGPT, arXiv 2403.03853"
    needs = ("distance",)
    published_for = Action.SKIP.letter

    @property
    def thresholds(self) -> Mapping[str, float]:
        """None."""
        return {}

    def risk(self, table: LayerTable) -> Risk:
        """The mean distance over all tokens."""
        default = math.inf if table.has("cosine_distance", "all") else None
        return everywhere(self.name, table.values("cosine_distance", "all", default=default))
