"""Adjacent cosine distance per token group, and nothing else: the simplest reading of the geometric notion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.table import LayerTable
from workers.runtime.plan import SAVING_LETTERS, Action

from .interface import Risk


@dataclass(frozen=True)
class Cosine:
    """Freeze: the vision tokens' mean distance. Bypass and skip: the larger of both groups' mean distances."""

    name = "cosine"
    source = "Hartman et al., arXiv 2509.25584 (average cosine distance); the step to actions is ours"
    needs = ("distance",)
    published_for = SAVING_LETTERS

    @property
    def thresholds(self) -> Mapping[str, float]:
        """None."""
        return {}

    def risk(self, table: LayerTable) -> Risk:
        """Risks per action letter; see the class."""
        vision, text = group_values(table, "cosine_distance")
        both = tuple(max(pair) for pair in zip(vision, text, strict=True))
        return Risk(self.name, {Action.FREEZE.letter: vision, Action.BYPASS.letter: both, Action.SKIP.letter: both})


def group_values(table: LayerTable, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A measurement of vision and of text tokens; where prompts hold no vision tokens, that of text for both.

    A layer without the measurement has infinity. Raises MeasurementError when no layer has it.
    """
    text = table.values(name, "text", default=math.inf if table.has(name, "text") else None)
    if not table.has(name, "vision"):
        return text, text
    return table.values(name, "vision", default=math.inf), text
