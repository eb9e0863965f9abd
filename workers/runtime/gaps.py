"""Where a plan leaves gaps in the residual stream, and what stands before them and can hold a map. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .plan import Action, SkipPlan

Scope = Literal["output", "projection"]
"""What a map behind a layer is: one of all that the MLP adds, or a change of the MLP's last projection."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Gap:
    """A maximal run of skipped layers, ``layer + 1`` to ``end``, behind the layer ``layer`` that stays.

    Where that layer runs without its attention or its MLP, what is missing of it belongs to the gap. An empty gap,
    ``end`` being ``layer``, has nothing else, or is the place of a map that takes back what gaps below have left.
    ``part`` is what holds the map: the last part of the layer that runs.
    """

    layer: int
    end: int
    part: Part = "mlp"

    @property
    def length(self) -> int:
        """Number of skipped layers."""
        return self.end - self.layer


def holder(action: Action) -> Part:
    """Name the part that runs last under an action, which can hold a map."""
    return "attention" if action.row.removes_part and action.row.leaves_out == "mlp" else "mlp"


def gaps(plan: SkipPlan, *, drift: bool = False) -> tuple[Gap, ...]:
    """Return the plan's gaps from the bottom up. One that starts at layer 0 has no layer to hold a map: it stays plain.

    Every layer without attention or MLP has one. With ``drift`` there is an empty gap behind every other kept layer
    above the first gap, too.
    """
    found: list[Gap] = []
    for layer in plan.kept:
        end = layer
        while end + 1 < len(plan) and plan[end + 1].row.removes_layer:
            end += 1
        if end > layer or plan[layer].row.removes_part or (drift and found):
            found.append(Gap(layer, end, holder(plan[layer])))
    return tuple(found)
