"""Nested sets in the criterion's risk order, per action."""

from __future__ import annotations

from optimizer.criteria import Risk
from optimizer.space import COMPENSATED, Candidate, PlanSpace


def nested_sets(space: PlanSpace, risk: Risk, limit: int | None = None) -> tuple[Candidate, ...]:
    """Plans that apply an action to the 1, 2, 3, ... least risky layers, at most ``limit`` of them.

    Short sets of every action come before long ones, so that a tight limit still tries each action. A compensated
    skip is an action of its own, in the order of the plain one.
    """
    seeds: dict[Candidate, None] = {}
    letters = [letter for letter in "FBSC" if any(letter in allowed for allowed in space.genome_letters)]
    for size in range(1, space.max_touched + 1):
        for letter in letters:
            order = risk.order("S" if letter == COMPENSATED and letter not in risk.risk else letter)
            layers = [layer for layer in order if letter in space.genome_letters[layer]]
            if size > len(layers):
                continue
            genome = "".join(letter if layer in layers[:size] else "R" for layer in range(space.num_layers))
            if space.allows(genome):
                seeds.setdefault(space.candidate(genome))
    return tuple(seeds)[:limit]
