"""Where a plan leaves gaps in the residual stream, and which layers stand before them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .plan import SkipPlan

Scope = Literal["output", "projection"]
"""What a map behind a layer is: one of all that the MLP adds, or a change of the MLP's last projection."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Gap:
    """A maximal run of skipped layers, ``layer + 1`` to ``end``, behind the layer ``layer`` that stays.

    An empty one, ``end`` being ``layer``, is the place of a map that takes back what gaps below have left.
    """

    layer: int
    end: int

    @property
    def length(self) -> int:
        """Number of skipped layers."""
        return self.end - self.layer


def gaps(plan: SkipPlan, *, drift: bool = False) -> tuple[Gap, ...]:
    """Return the plan's gaps from the bottom up. One that starts at layer 0 has no layer to hold a map: it stays plain.

    With ``drift`` there is an empty gap behind every kept layer above the first gap that has none.
    """
    found: list[Gap] = []
    for layer in plan.kept:
        end = layer
        while end + 1 < len(plan) and plan[end + 1].row.removes_layer:
            end += 1
        if end > layer or (drift and found):
            found.append(Gap(layer, end))
    return tuple(found)
