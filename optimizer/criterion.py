"""The redundancy criterion: from measurements to a predicted risk for every layer and action.

A criterion is a function from :class:`Redundancy` to :class:`Risk`; the seeds of the search come from the risk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.messages import TOKEN_GROUPS, RedundancySums


@dataclass(frozen=True)
class Redundancy:
    """Mean cosine distance between the states before and after each layer, per token group, with standard errors.

    ``distance[group][layer]`` lies in [0, 2]; 0 means the layer did not turn the state at all.
    """

    distance: dict[str, tuple[float, ...]]
    standard_error: dict[str, tuple[float | None, ...]]
    """None where a single sample gives no error."""
    tokens: dict[str, int]
    samples: int

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(next(iter(self.distance.values())))


def merge(shards: Sequence[RedundancySums]) -> Redundancy:
    """Exact means over all shards' tokens. Raises ValueError when a group has no token at all."""
    sums = RedundancySums.merge(shards)
    for group, count in sums.tokens.items():
        if count == 0:
            raise ValueError(f"the calibration split holds no {group} tokens")
    return Redundancy(
        distance={group: sums.mean(group) for group in TOKEN_GROUPS},
        standard_error={
            group: tuple(None if math.isnan(error) else error for error in sums.standard_error(group))
            for group in TOKEN_GROUPS
        },
        tokens=dict(sums.tokens),
        samples=sums.samples,
    )


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
