"""Check a criterion against the removals that were measured on the model itself, and weigh its risk by them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from scipy.stats import rankdata

from optimizer.statistics.rank_agreement import FEWEST_PAIRS, Agreement
from workers.redundancy.kinds import ANSWER, TRIED
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk

STAGE = "evidence"
"""Name under which a job keeps how its criterion agreed with removals when its search began."""
USEFUL = 0.5
"""Rank correlation that is worth following: a criterion fails only where its interval lies below."""


@dataclass(frozen=True)
class Evidence:
    """Rank agreement of a criterion's risk with the divergences that actions were measured to cause, 95 % interval."""

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
    """Compare a risk with what actions were measured to do at layers, where its criterion ``needs`` those kinds.

    Other kinds are left alone, whatever the table holds of them, so that a job's search hangs on nothing that other
    jobs measured. A criterion that needs the causal kind reads the harm of every action itself: there is nothing left
    to compare it with.

    Actions differ in size, so that ranks are taken within each; a layer counts once, by its mean rank over actions. A
    criterion that reads removals itself is judged by what it predicts without the layer's own.
    """
    names: dict[str, str] = {}
    if "causal" not in needs:
        if "propagation" in needs:
            names[Action.SKIP.letter] = "final_divergence"
        if "trials" in needs:
            names |= {action.letter: f"trial_divergence@{action.label}" for action in TRIED}
    ranks: dict[int, list[tuple[float, float]]] = {}
    for letter, name in names.items():
        values = (risk.unseen or risk.risk).get(letter, ())
        rows = [table.row(name, ANSWER, layer) for layer in range(len(values))]
        known = [row for row in rows if row is not None and math.isfinite(values[row.layer])]
        if len(known) >= FEWEST_PAIRS:
            predicted, measured = (
                rankdata(each) / len(known) for each in ([values[row.layer] for row in known], [r.value for r in known])
            )
            for row, *pair in zip(known, predicted.tolist(), measured.tolist(), strict=True):
                ranks.setdefault(row.layer, []).append((pair[0], pair[1]))
    means = [[sum(column) / len(pairs) for column in zip(*pairs, strict=True)] for pairs in ranks.values()]
    return Evidence(risk.criterion, Agreement.of_pairs([each[0] for each in means], [each[1] for each in means]))
