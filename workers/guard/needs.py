"""Say where a plan's guard reads, and how many images its rate needs. Needs no torch."""

from __future__ import annotations

import math

from workers.runtime.plan import Action, SkipPlan

DEEPEST = 2
"""Layers that have run where states are read, at most: deeper ones tell prompts apart no better (docs/guard.md)."""


def guard_layer(plan: SkipPlan, *, compensated: bool) -> int:
    """Return the decoder layer whose input a plan's guard reads: the plan and its maps change nothing below it."""
    shared = next((layer for layer, action in enumerate(plan) if action is not Action.RUN), len(plan))
    if compensated and 0 < shared < len(plan) and plan[shared].row.removes_layer:
        shared -= 1  # the gap's map lies in the layer before it
    return min(shared, DEEPEST, len(plan.kept) - 1)


def needed_prompts(false_alarms: float) -> int:
    """Return the fewest prompts from which a threshold at this rate can be told."""
    return math.ceil(1 / false_alarms - 1e-9) - 1


def too_few(prompts: int, false_alarms: float) -> str:
    """Say how many images a threshold needs."""
    rate = math.ceil(1e4 / (prompts + 1)) / 1e4
    return (
        f"guard.false_alarms: {false_alarms:g} needs {needed_prompts(false_alarms)} images in the search split, which "
        f"has {prompts}; raise splits.search" + (f", or the rate to {rate:g}" if rate < 1 else "")
    )
