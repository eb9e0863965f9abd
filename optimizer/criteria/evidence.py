"""Check a criterion against the removals that were measured on the model itself, and weigh its risk by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import rankdata

from optimizer.statistics.rank_agreement import FEWEST_PAIRS, Agreement
from workers.redundancy.kinds import ANSWER, TRIED
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk


@dataclass(frozen=True)
class Evidence:
    """Rank agreement of a criterion's risk with the divergences that actions were measured to cause, 95 % interval."""

    criterion: str
    agreement: Agreement

    @property
    def predicts(self) -> bool:
        """Whether the interval of rho is above 0; true where there is nothing to compare."""
        return self.agreement.low is None or self.agreement.low > 0

    @property
    def weight(self) -> float:
        """How much the risk's order counts: 1 for a criterion that predicts, else rho, at least 0."""
        return 1.0 if self.predicts or self.agreement.rho is None else max(0.0, self.agreement.rho)

    @property
    def warning(self) -> str:
        """One line about a criterion that does not predict, empty for one that does."""
        found = self.agreement
        if self.predicts or found.rho is None or found.low is None or found.high is None:
            return ""
        return (
            f"criterion {self.criterion} does not predict harm on this model: rank correlation with {found.pairs} "
            f"measured removals {found.rho:+.2f} [{found.low:+.2f}, {found.high:+.2f}]; its order counts "
            f"{self.weight:.2f} in the first plans and in the sampler's prior"
        )


def check(risk: Risk, table: LayerTable) -> Evidence:
    """Compare a risk with what actions were measured to do at layers, as far as the table says.

    Actions differ in size, so that ranks are taken within each; a layer counts once, by its mean rank over actions. A
    criterion that reads removals itself is judged by what it predicts without the layer's own.
    """
    names = {Action.SKIP.letter: "final_divergence"}
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
