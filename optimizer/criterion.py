"""The redundancy criterion: from measurements to a predicted risk for every layer and action.

A criterion is a function from :class:`Redundancy` to :class:`Risk`; the seeds of the search come from the risk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.messages import RedundancySums

GROUPS = ("vision", "text", "all")


@dataclass(frozen=True)
class Redundancy:
    """Mean cosine distance between the states before and after each layer, per token group, with standard errors.

    ``distance[group][layer]`` lies in [0, 2]; 0 means the layer did not turn the state at all.
    """

    distance: dict[str, tuple[float, ...]]
    standard_error: dict[str, tuple[float, ...]]
    tokens: dict[str, int]
    samples: int

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(next(iter(self.distance.values())))


def merge(shards: Sequence[RedundancySums]) -> Redundancy:
    """Exact means and standard errors of the means over all shards' tokens. Raises ValueError without any token."""
    distance: dict[str, tuple[float, ...]] = {}
    error: dict[str, tuple[float, ...]] = {}
    tokens = {group: sum(shard.tokens[group] for shard in shards) for group in GROUPS}
    for group, count in tokens.items():
        if count == 0:
            raise ValueError(f"the calibration split holds no {group} tokens")
        sums = [math.fsum(layer) for layer in zip(*(shard.distance_sum[group] for shard in shards), strict=True)]
        squares = [math.fsum(layer) for layer in zip(*(shard.distance_squares[group] for shard in shards), strict=True)]
        means = [total / count for total in sums]
        variances = [max(0.0, square / count - mean**2) for square, mean in zip(squares, means, strict=True)]
        distance[group] = tuple(means)
        error[group] = tuple(math.sqrt(variance / count) for variance in variances)
    return Redundancy(distance, error, tokens, sum(shard.samples for shard in shards))


@dataclass(frozen=True)
class Risk:
    """Predicted harm, at least 0, of every action at every layer: ``risk[letter][layer]``."""

    criterion: str
    risk: dict[str, tuple[float, ...]]

    def order(self, letter: str) -> tuple[int, ...]:
        """Layers from the least to the most risky for an action; ties go to the lower layer."""
        values = self.risk[letter]
        return tuple(sorted(range(len(values)), key=lambda layer: (values[layer], layer)))


class Criterion(Protocol):
    """Predicts the risk of each action at each layer."""

    name: str

    def __call__(self, redundancy: Redundancy) -> Risk:
        """The predicted risk; larger means more harm expected."""
        ...


class GeometricCriterion:
    """Risk from cosine distances alone (the geometric notion of Hartman et al., arXiv 2509.25584).

    The step from distances to risks is our reconstruction. Freezing touches vision tokens only, so its risk is their
    distance. Skipping needs both groups redundant, so its risk is the larger distance. Bypassing also takes the
    vision keys away from text; how much text relies on them a cosine cannot tell, and the loss is at most that of
    skipping the layer, so the same larger distance stands as the bound.
    """

    name = "geometric"

    def __call__(self, redundancy: Redundancy) -> Risk:
        """Risks per action letter; see the class."""
        vision, text = redundancy.distance["vision"], redundancy.distance["text"]
        both = tuple(max(pair) for pair in zip(vision, text, strict=True))
        return Risk(self.name, {"R": (0.0,) * len(vision), "F": vision, "B": both, "S": both})


CRITERIA: dict[str, Criterion] = {GeometricCriterion.name: GeometricCriterion()}
