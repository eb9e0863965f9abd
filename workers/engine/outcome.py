"""What is known of one plan while its samples are scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What is known of one plan so far, by the samples' places in the split."""

    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    """Samples that the plain path decides by themselves: two logits were too close, or NaN may have come from a
    neighbour in the packed sequence."""
    open: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What is known of answers that went another way than guessed and could still score."""
    unfinished: set[int] = field(default_factory=set)
    """Samples that memory is too short for: the plain path generates them."""
    failed: dict[str, str] = field(default_factory=dict)
    tied: set[int] = field(default_factory=set)

    def give_up(self, places: Iterable[int]) -> None:
        """Leave the open answers among these samples to the plain path."""
        here = self.open.keys() & set(places)
        self.unfinished |= here
        self.open = {place: tokens for place, tokens in self.open.items() if place not in here}
