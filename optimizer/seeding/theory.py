"""The seeds of a job, put together: some are evaluated first, the rest wait until the search thinks well of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from optimizer.criteria import Risk
from optimizer.seeding.additive import AdditiveProblem, Step, budgets, savings, spread_order
from optimizer.seeding.nested import nested_sets
from optimizer.space import COMPENSATED, Candidate, PlanSpace
from workers.runtime import SkipPlan

LADDER = 16
"""Latency budgets that the additive problem is solved for."""


@dataclass(frozen=True)
class Seeds:
    """``first`` are evaluated at once, the most informative first; ``reserve`` only when they look promising."""

    first: tuple[Candidate, ...] = ()
    reserve: tuple[Candidate, ...] = ()


def step_risks(space: PlanSpace, risk: Risk) -> dict[Step, float]:
    """The risk of every step of a space; a compensated skip counts as the plain one."""
    return {
        (layer, letter): risk.of(layer, "S" if letter == COMPENSATED else letter)
        for layer, letters in enumerate(space.genome_letters)
        for letter in letters.replace("R", "")
    }


def theory_seeds(
    space: PlanSpace,
    risk: Risk,
    ratio: Callable[[SkipPlan], float],
    possible: Callable[[Candidate], bool],
    *,
    first: int,
    structures: Sequence[Candidate] = (),
    published: Sequence[Candidate] = (),
) -> Seeds:
    """Seeds from a criterion's risk: the additive ladder and run structures first, nested and published sets behind.

    ``possible`` tells which candidates meet what can be known before an evaluation; ``first`` bounds the number of
    candidates that are evaluated whatever they look like.
    """
    saving = savings(space, ratio)
    families = [[each] for each in space.compensations] if len(space.compensations) > 1 else [space.compensations]
    ladders = []
    for compensations in families:
        part = PlanSpace(space.letters, space.max_touched, tuple(compensations))
        problem = AdditiveProblem(part, step_risks(part, risk), savings(part, ratio))
        ladders.append([each for each in problem.ladder(budgets(saving, LADDER)) if possible(each)])
    by_size = [structures[int(at)] for at in spread_order(len(structures))]
    mixed = _interleave([*ladders, [each for each in by_size if possible(each)]])
    rest = [*mixed[first:], *nested_sets(space, risk), *published]
    return Seeds(tuple(mixed[:first]), tuple(each for each in dict.fromkeys(rest) if possible(each)))


def random_seeds(space: PlanSpace, count: int, seed: int) -> Seeds:
    """As many random plans of random sizes: what the theory's seeds are compared with."""
    random = np.random.default_rng([seed, 2])
    found: dict[Candidate, None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        share = random.uniform(0.1, 0.9)
        skip = space.genome_letters
        family = COMPENSATED if space.recipe and random.random() < 1 / len(space.compensations) else "S"
        letters = []
        for own in skip:
            others = [letter for letter in own if letter != "R" and (letter not in "SC" or letter == family)]
            takes = others and random.random() < share
            letters.append(others[int(random.integers(len(others)))] if takes else "R")
        genome = "".join(letters)
        if space.allows(genome) and genome != "R" * space.num_layers:
            found.setdefault(space.candidate(genome))
    return Seeds(tuple(found))


def _interleave(lists: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    together = [each for group in zip_longest(*lists) for each in group if each is not None]
    return list(dict.fromkeys(together))
