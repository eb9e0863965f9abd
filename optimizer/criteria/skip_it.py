"""The project's own criterion: the conditions of the Skip-It paper, turned into a predicted risk per layer and action.

The conditions are the paper's (Hartman et al., arXiv 2509.25584): freezing is safe where the layer is redundant for
vision tokens, bypassing where besides text pays them little attention, skipping where it is redundant for vision and
text. Every formula here is ours; ``docs/theory.md`` says which variants were compared and how this one was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from workers.scoring.table import LayerTable

from .cosine import group_values
from .interface import Risk
from .layer_contribution import contributions


@dataclass(frozen=True)
class SkipIt:
    """Predicted from the dense model alone, without running any action.

    A risk is a sum of conditions, each over its threshold, so that at most 1 means predicted safe.
    """

    distance: float = 0.05
    attention: float = 0.1

    name = "skip-it"
    source = "conditions: Hartman et al., arXiv 2509.25584; formulas: this project"
    needs: ClassVar[tuple[str, ...]] = ("distance", "attention")
    published_for = "FBS"

    def __post_init__(self) -> None:
        for threshold in fields(self):
            if not getattr(self, threshold.name) > 0:
                raise ValueError(f"{threshold.name} must be above 0")

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Mean cosine distance, and attention on vision tokens, up to which a condition holds."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def risk(self, table: LayerTable) -> Risk:
        """Risks per action letter; see the class."""
        vision, text = group_values(table, "cosine_distance")
        attention = vision_attention(table)
        freeze = [self._frozen(vision[layer], attention[layer + 1 :]) for layer in range(table.num_layers)]
        bypass = [frozen + share / self.attention for frozen, share in zip(freeze, attention, strict=True)]
        skip = [max(frozen, moved / self.distance) for frozen, moved in zip(freeze, text, strict=True)]
        return Risk(self.name, {"F": tuple(freeze), "B": tuple(bypass), "S": tuple(skip)})

    def _frozen(self, distance: float, later_attention: Sequence[float]) -> float:
        """A vision state is only read through the attention of later layers: none of it, no harm."""
        read = 1.0 - math.prod(1.0 - share for share in later_attention)
        return distance / self.distance * read


def vision_attention(table: LayerTable) -> tuple[float, ...]:
    """Attention of text on vision tokens; 0 where a layer has none to measure, or prompts hold no vision tokens."""
    return table.values("vision_attention", "text", default=0.0)


@dataclass(frozen=True)
class SkipItCausal(SkipIt):
    """With the causal part: the contribution of every action itself, measured on calibration samples.

    It costs a pass for every layer and action, and is a measurement of the harm of single actions, no prediction of
    it; ``skip-it`` breaks its ties.
    """

    name = "skip-it-causal"
    needs: ClassVar[tuple[str, ...]] = ("distance", "attention", "causal")

    def risk(self, table: LayerTable) -> Risk:
        """The contribution, and a millionth of the predicted risk."""
        predicted = super().risk(table)
        measured = contributions(table)
        both = {
            letter: tuple(kl + 1e-6 * risk for kl, risk in zip(measured[letter], predicted.risk[letter], strict=True))
            for letter in measured
        }
        return Risk(self.name, both)
