"""Layer contribution (Yuan et al., "ShortV", arXiv 2504.00502): KL(p_dense || p_changed) at the answer position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.kinds import INTERVENTIONS
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk


@dataclass(frozen=True)
class LayerContribution:
    """Published for freezing vision tokens; here each action has the divergence it causes itself.

    No prediction but a measurement: what every action does alone, on calibration samples. It costs a pass for every
    layer and action.
    """

    name = "layer-contribution"
    source = "ShortV, arXiv 2504.00502"
    needs = ("causal",)
    published_for = Action.FREEZE.letter

    @property
    def thresholds(self) -> Mapping[str, float]:
        """None."""
        return {}

    def risk(self, table: LayerTable) -> Risk:
        """The measured divergences; infinite where the model refuses the action."""
        return Risk(self.name, contributions(table))


def contributions(table: LayerTable) -> dict[str, tuple[float, ...]]:
    """The causal contribution of every action at every layer; infinite where the model refuses the action."""
    found = {action.letter: f"layer_contribution@{action.label}" for action in INTERVENTIONS}
    if not any(table.has(name, "last") for name in found.values()):
        table.values(found[Action.SKIP.letter], "last")  # says what is missing
    return {letter: table.values(name, "last", default=math.inf) for letter, name in found.items()}
