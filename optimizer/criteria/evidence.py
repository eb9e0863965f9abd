"""Check a criterion against the removals that were measured on the model itself, and weigh its risk by them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from optimizer.statistics.rank_agreement import Agreement
from workers.redundancy.kinds import ANSWER
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk

STAGE = "evidence"
"""Name under which a job keeps how its criterion agreed with removals when its search began."""
USEFUL = 0.5
"""Rank correlation that is worth following: a criterion fails only where its interval lies below."""


@dataclass(frozen=True)
class Evidence:
    """Rank agreement of a criterion's risk of skips with the divergences that removals caused, with a 95 % interval."""

    criterion: str
    agreement: Agreement

    @property
    def agrees(self) -> bool:
        """Whether the interval of rho is above 0."""
        return self.agreement.low is not None and self.agreement.low > 0

    @property
    def fails(self) -> bool:
        """Whether the interval of rho reaches down to 0 and not up to ``USEFUL``. Too little evidence fails nobody."""
        return not self.agrees and self.agreement.high is not None and self.agreement.high < USEFUL

    @property
    def weight(self) -> float:
        """How much the risk's order counts: rho, at least 0, for a criterion that fails, else 1."""
        return max(0.0, self.agreement.rho or 0.0) if self.fails else 1.0

    @property
    def verdict(self) -> str:
        """Whether the criterion agrees with the removals, in a sentence with numbers; empty where none was compared."""
        found = self.agreement
        if found.rho is None or found.low is None or found.high is None:
            return ""
        if self.agrees:
            said = "agrees with removals on calibration samples"
        elif self.fails:
            said = "does not predict harm on this model"
        else:
            said = f"is not shown to predict harm on this model ({found.pairs} layers)"
        counts = f"{self.weight:.2f}" if self.fails else "in full"
        return (
            f"criterion {self.criterion} {said}: rank correlation over {found.pairs} layers {found.rho:+.2f} "
            f"[{found.low:+.2f}, {found.high:+.2f}]; its order counts {counts} in the first plans and in the sampler's "
            "prior"
        )


def check(risk: Risk, table: LayerTable, needs: Collection[str]) -> Evidence:
    """Compare the risk of skips with what removals did, where its criterion ``needs`` the propagation kind.

    Otherwise removals are left alone, whatever the table holds of them, so that a job's search hangs on nothing that
    other jobs measured. A criterion that needs the causal kind or trials reads the harm of every action itself: there
    is nothing left to compare it with.
    """
    compared = "propagation" in needs and not {"causal", "trials"} & set(needs)
    pairs = [
        (value, row.value)
        for layer, value in enumerate(risk.risk[Action.SKIP.letter] if compared else ())
        if math.isfinite(value) and (row := table.row("final_divergence", ANSWER, layer)) is not None
    ]
    return Evidence(risk.criterion, Agreement.of_pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
