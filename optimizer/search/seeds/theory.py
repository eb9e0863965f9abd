"""Assemble the seeds of a job: some are evaluated first, the rest when the surrogate predicts a gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from optimizer.criteria import Risk
from optimizer.search.seeds.additive import AdditiveProblem, Step, budgets, savings, spread_order, steps_of
from optimizer.search.seeds.blocks import Unexplained, best_blocks
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.seeds.nested import nested_chains, nested_sets
from optimizer.search.space import COMPENSATED, RUN, SKIP, Candidate, PlanSpace
from workers.runtime import Action
from workers.runtime.plan import PART_LETTERS

COMPENSATION_GAIN = 0.15
"""Risk of a compensated skip as a share of a plain one's; only the search's first guess depends on it."""
BUDGETS = 16
"""Latency budgets that the additive problem is solved for."""


@dataclass(frozen=True)
class Seeds:
    """``first`` are evaluated at once, the most informative first; ``reserve`` only when they look promising.

    ``chains`` are nested plans, of each of which the last good one is searched by bisection.
    """

    first: tuple[Candidate, ...] = ()
    reserve: tuple[Candidate, ...] = ()
    chains: tuple[tuple[Candidate, ...], ...] = ()


def with_compensated(risk: Risk, unexplained: Unexplained) -> Risk:
    """Return the risk with a row for compensated skips (``C``), ``COMPENSATION_GAIN`` times as safe on the whole.

    Where linear redundancy was measured, it says how the risk is spread over the layers; else the plain skip does.
    """
    plain = risk.risk[SKIP]
    shares = [unexplained.get((layer - 1, layer), math.inf) for layer in range(len(plain))]
    known = [share for share in shares if math.isfinite(share)]
    finite = [value for value in plain if math.isfinite(value)]
    if not known or not finite or sum(known) == 0:
        compensated = tuple(COMPENSATION_GAIN * value for value in plain)
    else:
        scale = COMPENSATION_GAIN * (sum(finite) / len(finite)) / (sum(known) / len(known))
        compensated = tuple(scale * share for share in shares)
    return Risk(risk.criterion, risk.risk | {COMPENSATED: compensated})


def step_risks(space: PlanSpace, risk: Risk) -> dict[Step, float]:
    """Return the risk of every step of a space; where all gaps are compensated, those of parts of layers as well."""
    gains = {} if space.has_plain else dict.fromkeys(PART_LETTERS, COMPENSATION_GAIN)
    return {(layer, letter): gains.get(letter, 1.0) * risk.of(layer, letter) for layer, letter in steps_of(space)}


def theory_seeds(
    space: PlanSpace,
    risk: Risk,
    feasible: FeasiblePlans,
    *,
    unexplained: Unexplained | None = None,
    published: Sequence[Sequence[Candidate]] = (),
) -> Seeds:
    """Seeds of a criterion's risk: additive solutions, compensated blocks, nested sets, and published methods'.

    ``unexplained`` is the linear redundancy, where compensated plans are in the space and it was measured;
    ``published`` are the plans of other methods, method by method. Plans that are not ``feasible`` are left out.
    """
    saving = savings(space, feasible.ratio)
    limits = tuple(feasible.sums.values())
    shares = unexplained or {}
    risk = with_compensated(risk, shares)
    structures = best_blocks(space, shares) if space.recipe and shares else ()
    solutions: list[Sequence[Candidate]] = []
    for part in (*space.parts, *_of_whole_layers(space)):
        problem = AdditiveProblem(part, step_risks(part, risk), savings(part, feasible.ratio), limits=limits)
        solutions.append(problem.solutions(budgets(saving, BUDGETS)))
    by_size = [structures[int(at)] for at in spread_order(len(structures))]
    others = (chain for chain in (*nested_chains(space, risk), *published) if not _of_parts(space, chain))
    chains = [*solutions, by_size, *others]
    possible = [tuple(each for each in plans if each in feasible) for plans in chains]
    mixed = [*_interleave([*solutions, by_size]), *nested_sets(space, risk), *(p for plans in published for p in plans)]
    reserve = tuple(each for each in dict.fromkeys(mixed) if each in feasible)
    return Seeds((), reserve, tuple(chain for chain in possible if chain))


def _of_whole_layers(space: PlanSpace) -> tuple[PlanSpace, ...]:
    """Return the space without what leaves out parts of layers, if it has any: many small risks add up badly."""
    letters = tuple("".join(own for own in each if not Action.of(own).row.leaves_out) for each in space.letters)
    return () if letters == space.letters else replace(space, letters=letters).parts


def _of_parts(space: PlanSpace, chain: Sequence[Candidate]) -> bool:
    """Whether a chain leaves out parts of layers that its space can leave out as wholes.

    Parts are in the additive solutions too; a bisection of their own costs more than it shows.
    """
    rows = [action.row for candidate in chain[:1] for action in candidate.plan if action.row.leaves_out]
    wholes = (Action.FREEZE.letter,) if rows and rows[0].vision_only else (SKIP, COMPENSATED)
    return bool(rows) and any(letter in own for own in space.genome_letters for letter in wholes)


def random_seeds(feasible: FeasiblePlans, count: int, seed: int) -> Seeds:
    """At most as many random feasible plans of random sizes: what the theory's seeds are compared with."""
    space, random = feasible.space, np.random.default_rng([seed, 2])
    found: dict[Candidate, None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        share = random.uniform(0.1, 0.9)
        skip = space.genome_letters
        kind = COMPENSATED if space.recipe and random.random() < 1 / len(space.compensations) else SKIP
        letters = []
        for own in skip:
            others = [
                letter for letter in own if letter != RUN and (letter not in (SKIP, COMPENSATED) or letter == kind)
            ]
            takes = others and random.random() < share
            letters.append(others[int(random.integers(len(others)))] if takes else RUN)
        genome = "".join(letters)
        if not space.allows(genome) or genome == RUN * space.num_layers:
            continue
        candidate = space.candidate(genome)
        if candidate in feasible:
            found.setdefault(candidate)
    return Seeds(tuple(found))


def _interleave(lists: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    together = [each for group in zip_longest(*lists) for each in group if each is not None]
    return list(dict.fromkeys(together))
