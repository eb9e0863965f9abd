"""The project's own criterion: the conditions of the Skip-It paper, turned into a predicted risk per layer and action.

The conditions are the paper's (Hartman et al., arXiv 2509.25584): freezing is safe where the layer is redundant for
vision tokens, bypassing where besides text pays them little attention, skipping where it is redundant for vision and
text. Every formula here is ours; ``docs/theory.md`` says which variants were compared and how this one was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from workers.redundancy.kinds import ANSWER
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, Thresholds, known_values, per_operator
from .published import contributions, group_values


@dataclass(frozen=True)
class SkipItStatic(Thresholds):
    """From the dense model's own passes alone: nothing is removed, no action is run.

    - Freeze moves the vision states of one layer. Nobody reads them but later layers' attention: the vision tokens'
      mean distance, times the largest share of attention that a later layer's text pays to them.
    - Skip: how far the layer turns the last prompt token, from whose state the answer is read.
    - Bypass takes the vision tokens' part from what the layer does for text: that angle, times the share of attention
      that the layer's own text pays to vision tokens.
    - A part of the layer alone: as skip, with how far the part turns the last prompt token; for vision tokens alone as
      freeze, with the distance that the part moves them.

    Each is over its threshold, so that at most 1 means predicted safe.
    """

    freeze: float = 0.01
    bypass: float = 0.05
    skip: float = 0.1

    name = "skip-it-static"
    source = "conditions: Hartman et al., arXiv 2509.25584; formulas: this project"
    needs: ClassVar[tuple[str, ...]] = ("distance", "attention", "angular")
    published_for = ""

    def __post_init__(self) -> None:
        for name, threshold in self.thresholds.items():
            if not threshold > 0:
                raise ValueError(f"{name} must be above 0")

    def risk(self, table: LayerTable) -> Risk:
        turned = known_values(table, "angular_distance@1", "last")
        return self._risk(table, (1.0,) * table.num_layers, turned, lambda part: _turned_by(table, part))

    def _risk(
        self,
        table: LayerTable,
        gain: Sequence[float],
        removed: Sequence[float],
        part_removed: Callable[[str], Sequence[float]],
    ) -> Risk:
        """Combine what removing layers and parts of them does with what text reads of vision tokens."""
        attention = vision_attention(table)

        def frozen(distance: str) -> tuple[float, ...]:
            vision, _ = group_values(table, distance)
            each = zip(vision, gain, later_attention(attention), strict=True)
            return tuple(d if math.isinf(d) else d * grown * read / self.freeze for d, grown, read in each)

        def of_part(part: str, vision_only: bool) -> tuple[float, ...]:
            if vision_only:
                return frozen(f"operator_distance@{part}")
            return tuple(value / self.skip for value in part_removed(part))

        bypass = [moved * share for moved, share in zip(removed, attention, strict=True)]
        layers = {
            Action.FREEZE.letter: frozen("cosine_distance"),
            Action.BYPASS.letter: tuple(value / self.bypass for value in bypass),
            Action.SKIP.letter: tuple(value / self.skip for value in removed),
        }
        return Risk(self.name, layers | per_operator(table, of_part))


@dataclass(frozen=True)
class SkipIt(SkipItStatic):
    """With propagation: every layer is removed once, and the last layer's state is looked at, not the answer.

    - Freeze: as without propagation, times the gain by which a change of the layer's vision states grows on the way up.
    - Skip: the geometric mean of how far the layer turns the last prompt token, and of how far the last layer's state
      moves when the layer is removed, at that token and on average over text. The last token alone says nothing about
      an answer whose first word is always the same.
    - Bypass: that, times the share of attention that the layer's own text pays to vision tokens.
    - A part of the layer alone: as skip, with how far the part turns the last prompt token, and with the last layer's
      state moved by the part's share of the layer's change.
    """

    freeze: float = 0.005
    bypass: float = 0.02
    skip: float = 0.125

    name = "skip-it"
    needs: ClassVar[tuple[str, ...]] = ("distance", "attention", "angular", "propagation")

    def risk(self, table: LayerTable) -> Risk:
        turned = known_values(table, "angular_distance@1", "last")
        moved = {group: _cautious(table, "final_change", group) for group in ("text", "last")}
        removed = _geometric_mean(turned, *moved.values())

        def part_removed(part: str) -> list[float]:
            shares = {group: known_values(table, f"operator_share@{part}", group) for group in moved}
            by_part = ([_times(m, s) for m, s in zip(moved[group], shares[group], strict=True)] for group in moved)
            return _geometric_mean(_turned_by(table, part), *by_part)

        with_vision = table.has("propagation_gain", "vision")
        gain = _cautious(table, "propagation_gain", "vision") if with_vision else (1.0,) * table.num_layers
        return self._risk(table, gain, removed, part_removed)


def _geometric_mean(*columns: Sequence[float]) -> list[float]:
    """Layer by layer."""
    return [_times(*each) ** (1 / len(columns)) for each in zip(*columns, strict=True)]


def _times(*factors: float) -> float:
    """Multiply; what could not be measured stays infinite, even where another factor is 0."""
    return math.inf if math.inf in factors else math.prod(factors)


def _turned_by(table: LayerTable, part: str) -> tuple[float, ...]:
    """How far a part turns the last prompt token; infinite at layers that cannot be taken apart."""
    return known_values(table, f"operator_angle@{part}", "last")


def _cautious(table: LayerTable, name: str, group: str) -> tuple[float, ...]:
    """Return a measurement of removing layers; one that the model does not let go counts as the worst of the others."""
    if not table.has(name, group):
        return table.values(name, group)  # says what is missing
    known = [value for value in table.values(name, group, default=-1.0) if value >= 0]
    return table.values(name, group, default=max(known))


def later_attention(attention: Sequence[float]) -> tuple[float, ...]:
    """For each layer the largest attention on vision tokens among the layers above it, 0 at the last."""
    return tuple(max(attention[layer + 1 :], default=0.0) for layer in range(len(attention)))


def vision_attention(table: LayerTable) -> tuple[float, ...]:
    """Attention of text on vision tokens. A layer without attention maps may read any of them: it counts as 1.

    Where prompts hold no vision tokens there is nothing to read: 0.
    """
    return table.values("vision_attention", "text", default=1.0 if table.has("cosine_distance", "vision") else 0.0)


@dataclass(frozen=True)
class SkipItCausal(SkipIt):
    """With the causal part: the divergence that every action itself causes, over the dense model's whole answer.

    It costs a pass for every layer and action, and is a measurement of the harm of single actions, no prediction of
    it; ``skip-it`` breaks its ties.
    """

    name = "skip-it-causal"
    needs: ClassVar[tuple[str, ...]] = (*SkipIt.needs, "causal")

    def risk(self, table: LayerTable) -> Risk:
        # A millionth of the predicted risk breaks ties.
        predicted = super().risk(table)
        measured = contributions(table, ANSWER)
        both = {
            letter: tuple(kl + 1e-6 * predicted.of(layer, letter) for layer, kl in enumerate(values))
            for letter, values in measured.items()
        }
        return Risk(self.name, both)
