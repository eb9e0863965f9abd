"""Predicted latency of a plan: the additive model over the per-layer profile. Steers the search, is never published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from workers.runtime import Action, SkipPlan

RUN = Action.RUN.letter

Ratio = Callable[[SkipPlan], float]
"""From a plan to its predicted latency as a share of dense."""


class LayerTimes(Protocol):
    """A measured or a stored latency profile: seconds of a dense request, and of each layer under each action."""

    @property
    def dense_latency_seconds(self) -> float:
        """Seconds of a request of the dense model."""
        ...

    @property
    def layer_seconds(self) -> Mapping[str, tuple[float, ...]]:
        """By letter, each layer's part in the whole request."""
        ...


@dataclass(frozen=True)
class LayerCounts:
    """Instead of measured times: a layer that runs takes one unit everywhere, so that a search can be repeated."""

    dense_latency_seconds: float
    layer_seconds: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, num_layers: int, letters: str) -> LayerCounts:
        """Count every layer with the share of its work that the action leaves."""
        return cls(float(num_layers), {letter: (Action.of(letter).row.work,) * num_layers for letter in letters})


def latency_ratio(profile: LayerTimes, plan: SkipPlan) -> float:
    """Predicted request time of ``plan`` as a share of the dense model's; lower is faster, 1.0 is dense."""
    return ratio_of_text(profile, plan.text)


def ratio_of_text(profile: LayerTimes, plan: str) -> float:
    """Return the same for a plan's text, which needs not be parsed where there are thousands.

    A layer whose action was measured slower than running it (noise, or a real overhead) counts as it was measured.
    """
    seconds = profile.layer_seconds
    running = seconds[RUN]
    saved = sum(running[layer] - seconds[letter][layer] for layer, letter in enumerate(plan) if letter != RUN)
    # Measured layer times can add up to more than the whole by noise; a request never takes no time at all.
    return max(0.01, 1.0 - saved / profile.dense_latency_seconds)
