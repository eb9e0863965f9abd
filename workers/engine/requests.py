"""What is asked for, and what is known of it while samples are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.tasks import Sample


@dataclass
class Outcome:
    """What is known of one plan so far, by the samples' places in the split."""

    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    """Samples that the plain path decides by themselves: two logits were too close, or NaN may have come from a
    neighbour in the packed sequence."""
    unfinished: set[int] = field(default_factory=set)
    """Samples that memory is too short for: the plain path generates them."""
    failed: dict[str, str] = field(default_factory=dict)
    tied: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Asked:
    """Plans to be scored on consecutive samples of a split, the first of which stands at place ``start``."""

    plans: tuple[SkipPlan, ...]
    samples: Sequence[Sample]
    start: int = 0
    folded: Mapping[str, Maps] = field(default_factory=dict)
    """By plan, maps that are folded into the weights while it is run, as in an export."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By plan."""

    def __post_init__(self) -> None:
        self.outcomes.update({plan.text: Outcome() for plan in self.plans})

    def sample(self, place: int) -> Sample:
        """The sample at a place of the split."""
        return self.samples[place - self.start]

    def of(self, places: Sequence[int]) -> list[Sample]:
        """The samples at places of the split."""
        return [self.sample(place) for place in places]
