"""Where a plan leaves gaps in the residual stream, and which layers stand before them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Action, SkipPlan


@dataclass(frozen=True)
class Gap:
    """A maximal run of skipped layers, ``layer + 1`` to ``end``, behind the layer ``layer`` that stays."""

    layer: int
    end: int

    @property
    def length(self) -> int:
        """Number of skipped layers."""
        return self.end - self.layer


def gaps(plan: SkipPlan) -> tuple[Gap, ...]:
    """The plan's gaps from the bottom up. A run that starts at layer 0 has no layer to hold a map: it stays plain."""
    found = []
    for layer in plan.kept:
        end = layer
        while end + 1 < len(plan) and plan[end + 1] is Action.SKIP:
            end += 1
        if end > layer:
            found.append(Gap(layer, end))
    return tuple(found)
