"""Visual token withdrawal (Lin et al., "VTW", arXiv 2405.05803): vision tokens leave for good at one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, everywhere


@dataclass(frozen=True)
class VisualTokenWithdrawal:
    """Withdraw from the smallest layer K on whose mean divergence is at most ``eta`` (0.003 for LLaVA-1.5-7B).

    A layer's risk is the divergence of withdrawing from it on, over eta: at most 1 where the method withdraws.
    """

    eta: float = 0.003

    name = "vtw"
    source = "VTW, arXiv 2405.05803"
    needs = ("withdrawal",)
    published_for = Action.BYPASS.letter

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta must be above 0, not {self.eta:g}")

    @property
    def thresholds(self) -> Mapping[str, float]:
        """The divergence that may be lost."""
        return {"eta": self.eta}

    def risk(self, table: LayerTable) -> Risk:
        """See the class."""
        default = math.inf if table.has("withdrawal", "last") else None
        divergence = table.values("withdrawal", "last", default=default)
        return everywhere(self.name, tuple(value / self.eta for value in divergence))
