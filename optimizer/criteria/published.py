"""Criteria of the literature, and the simplest readings of what they measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from workers.redundancy.kinds import INTERVENTIONS, OPERATORS
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import MEASURED_LETTERS, Risk, Thresholds, everywhere, known_values, per_operator

SKIP, BYPASS, FREEZE = Action.SKIP.letter, Action.BYPASS.letter, Action.FREEZE.letter


@dataclass(frozen=True)
class Cosine(Thresholds):
    """Adjacent cosine distance per token group: the simplest reading of the geometric notion of redundancy.

    Freeze: the vision tokens' mean distance. Bypass and skip: the larger of both groups' mean distances. A part alone:
    likewise, of what the part adds.
    """

    name = "cosine"
    source = "Hartman et al., arXiv 2509.25584 (average cosine distance); the step to actions is ours"
    needs = ("distance",)
    published_for = MEASURED_LETTERS

    def risk(self, table: LayerTable) -> Risk:
        def of(name: str, vision_only: bool = False) -> tuple[float, ...]:
            vision, text = group_values(table, name)
            return vision if vision_only else tuple(map(max, vision, text))

        both = of("cosine_distance")
        parts = per_operator(table, lambda part, vision_only: of(f"operator_distance@{part}", vision_only))
        return Risk(self.name, {FREEZE: of("cosine_distance", True), BYPASS: both, SKIP: both} | parts)


@dataclass(frozen=True)
class BlockInfluence(Thresholds):
    """Block Influence, 1 - E cos(X_{l-1}, X_l) over all tokens: published for removing layers.

    Of a part alone, the same of the state before and behind it, which LLM-Drop (arXiv 2406.15786) ranks parts by.
    """

    name = "block-influence"
    source = "ShortGPT, arXiv 2403.03853"
    needs = ("distance",)
    published_for = SKIP

    def risk(self, table: LayerTable) -> Risk:
        def of(part: str, vision_only: bool) -> tuple[float, ...]:
            group = "vision" if vision_only and table.has("cosine_distance", "vision") else "all"
            return known_values(table, f"operator_distance@{part}", group)

        layers = everywhere(self.name, known_values(table, "cosine_distance", "all"))
        return Risk(self.name, layers.risk | per_operator(table, of))


@dataclass(frozen=True)
class Angular(Thresholds):
    """Angular distance at the last token, (1/pi) arccos cos(X_l, X_{l+n}): published for removing a block of n layers.

    The block is that after the l (0 included) which minimises the distance; ``block`` is n. A layer's risk is the
    smallest distance of a block of n layers that holds it, so that with n = 1 it is the layer's own, and otherwise the
    best block comes first.
    """

    block: float = 1

    name = "angular"
    source = "Gromov et al., arXiv 2403.17887"
    needs = ("angular",)
    published_for = SKIP

    def __post_init__(self) -> None:
        if self.block < 1 or self.block != int(self.block):
            raise ValueError(f"block must be a whole number of layers, at least 1, not {self.block:g}")

    def risk(self, table: LayerTable) -> Risk:
        layers = table.num_layers
        length = min(int(self.block), layers)
        starts = known_values(table, f"angular_distance@{length}", "last")
        values = tuple(min(starts[max(0, layer - length + 1) : layer + 1]) for layer in range(layers))
        return everywhere(self.name, values)

    @staticmethod
    def best_block(table: LayerTable, length: int) -> range:
        """Return the ``length`` layers that the method removes."""
        found = [
            (row.value, start)
            for start in range(table.num_layers - length + 1)
            if (row := table.row(f"angular_distance@{length}", "last", start)) is not None
        ]
        _, start = min(found)
        return range(start, start + length)


@dataclass(frozen=True)
class LayerContribution(Thresholds):
    """Layer contribution, KL(p_dense || p_changed) at the last prompt token: published for freezing vision tokens.

    Here each action has the divergence it causes itself. No prediction but a measurement: what every action does
    alone, on calibration samples. It costs a pass for every layer and action.
    """

    name = "layer-contribution"
    source = "ShortV, arXiv 2504.00502"
    needs = ("causal",)
    published_for = FREEZE

    def risk(self, table: LayerTable) -> Risk:
        return Risk(self.name, contributions(table, "last"))


@dataclass(frozen=True)
class VisualTokenWithdrawal(Thresholds):
    """Withdraw from the smallest layer K on whose mean divergence is at most ``eta`` (0.003 for LLaVA-1.5-7B).

    A layer's risk is the divergence of withdrawing from it on, over eta: at most 1 where the method withdraws.
    """

    eta: float = 0.003

    name = "vtw"
    source = "VTW, arXiv 2405.05803"
    needs = ("withdrawal",)
    published_for = BYPASS

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta must be above 0, not {self.eta:g}")

    def risk(self, table: LayerTable) -> Risk:
        return everywhere(self.name, tuple(value / self.eta for value in known_values(table, "withdrawal", "last")))


@dataclass(frozen=True)
class LinearRedundancy(Thresholds):
    """Share of the state behind a layer that no linear map of the MLP output of the layer before it explains.

    The predicted harm of skipping one layer with compensation; runs of layers are rated by the seeds themselves.
    """

    name = "linear-redundancy"
    source = "skipplan, docs/compensation.md"
    needs = ("linear",)
    published_for = ""

    def risk(self, table: LayerTable) -> Risk:
        before = known_values(table, "linear_redundancy@1", "all")
        return everywhere(self.name, (math.inf, *before[:-1]))  # no layer before layer 0 could hold a map


@dataclass(frozen=True)
class LateEntry(Thresholds):
    """Vision tokens enter late: the first layers are the least risky (a prefix is bypassed). Needs no measurement."""

    name = "late-entry"
    source = "Skip-It, arXiv 2509.25584; DeepInsert, arXiv 2504.19327"
    needs: ClassVar[tuple[str, ...]] = ()
    published_for = BYPASS

    def risk(self, table: LayerTable) -> Risk:
        return everywhere(self.name, tuple((layer + 1) / table.num_layers for layer in range(table.num_layers)))


@dataclass(frozen=True)
class EarlyExit(Thresholds):
    """Vision tokens leave early: the last layers are the least risky (a suffix is bypassed). Needs no measurement."""

    name = "early-exit"
    source = "Skip-It, arXiv 2509.25584; VTW, arXiv 2405.05803"
    needs: ClassVar[tuple[str, ...]] = ()
    published_for = BYPASS

    def risk(self, table: LayerTable) -> Risk:
        layers = table.num_layers
        return everywhere(self.name, tuple((layers - layer) / layers for layer in range(layers)))


def group_values(table: LayerTable, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return a measurement of vision and of text tokens; where prompts hold no vision tokens, that of text for both.

    A layer without the measurement has infinity. Raises MeasurementError when no layer has it.
    """
    text = known_values(table, name, "text")
    return (known_values(table, name, "vision") if table.has(name, "vision") else text), text


def contributions(table: LayerTable, group: str, name: str = "layer_contribution") -> dict[str, tuple[float, ...]]:
    """Return what every action alone did at every layer, by letter; infinite where the model refuses the action.

    ``group`` is ``last``, the answer's first token, or ``answer``, the mean over the tokens of the dense answer.
    """
    found = {action.letter: f"{name}@{action.label}" for action in INTERVENTIONS}
    parts = {action.letter: f"{name}@{action.label}" for action in OPERATORS}
    found |= {letter: each for letter, each in parts.items() if table.has(each, group)}
    if not any(table.has(each, group) for each in found.values()):
        table.values(found[SKIP], group)  # says what is missing
    return {letter: table.values(each, group, default=math.inf) for letter, each in found.items()}
