"""Nested sets in the criterion's risk order, per action."""

from __future__ import annotations

from itertools import zip_longest

from optimizer.criteria import Risk
from optimizer.search.space import COMPENSATED, RUN, SKIP, Candidate, PlanSpace
from workers.runtime.plan import SAVING_LETTERS


def nested_sets(space: PlanSpace, risk: Risk) -> tuple[Candidate, ...]:
    """Return plans that apply an action to the 1, 2, 3, ... least risky layers.

    Short sets of every action come before long ones, so that the first few try each action. A compensated
    skip is an action of its own, in the order of the plain one.
    """
    by_size = zip_longest(*nested_chains(space, risk))
    seeds = dict.fromkeys(each for size in by_size for each in size if each is not None)
    return tuple(seeds)


def nested_chains(space: PlanSpace, risk: Risk) -> tuple[tuple[Candidate, ...], ...]:
    """Return the nested sets action by action, each from one layer to as many as may be touched."""
    letters = [
        letter for letter in SAVING_LETTERS + COMPENSATED if any(letter in allowed for allowed in space.genome_letters)
    ]
    chains = []
    for letter in letters:
        order = risk.order(SKIP if letter == COMPENSATED and letter not in risk.risk else letter)
        layers = [layer for layer in order if letter in space.genome_letters[layer]]
        genomes = [
            "".join(letter if layer in layers[:size] else RUN for layer in range(space.num_layers))
            for size in range(1, min(len(layers), space.max_touched) + 1)
        ]
        chains.append(tuple(space.candidate(genome) for genome in genomes if space.allows(genome)))
    return tuple(chains)
