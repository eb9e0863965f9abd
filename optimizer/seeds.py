"""The first plans of a search: nested sets in the criterion's risk order, per action."""

from __future__ import annotations

from optimizer.criterion import Risk
from optimizer.space import PlanSpace
from workers.runtime import Action, SkipPlan


def nested_sets(space: PlanSpace, risk: Risk, limit: int) -> tuple[SkipPlan, ...]:
    """Plans that apply an action to the 1, 2, 3, ... least risky layers, at most ``limit`` of them.

    Short sets of every action come before long ones, so that a tight limit still tries each action.
    """
    seeds: dict[str, SkipPlan] = {}
    letters = [letter for letter in "FBS" if any(letter in allowed for allowed in space.letters)]
    for size in range(1, space.max_touched + 1):
        for letter in letters:
            layers = [layer for layer in risk.order(letter) if letter in space.letters[layer]]
            if size > len(layers):
                continue
            plan = SkipPlan.dense(space.num_layers)
            for layer in layers[:size]:
                plan = plan.with_action(layer, Action(letter))
            if plan in space:
                seeds.setdefault(plan.text, plan)
    return tuple(seeds.values())[:limit]
