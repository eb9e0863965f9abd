"""Strategies that ask a sampler: the project's own, and Optuna's.

Chains of nested plans, where the problem has any, are bisected before the sampler is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import NDArray

from optimizer.search.problem import Problem, Strategy
from optimizer.search.seeds.blocks import unexplained_shares
from optimizer.search.seeds.theory import with_compensated
from optimizer.search.space import RUN
from optimizer.search.strategies.bisection import Bisection
from optimizer.search.strategies.study import StudyStrategy, distributions, genome_of, parameters
from optimizer.search.surrogate.sampler import Settings, Space, SurrogateSampler

Floats = NDArray[np.float64]

STARTUP = 10
"""Trials before one of Optuna's model-based samplers fits its model."""


def surrogate(problem: Problem) -> Strategy:
    """Ask the project's own sampler."""
    return _asking(surrogate_sampler(problem), problem)


def tpe(problem: Problem) -> Strategy:
    """Ask Optuna's tree-structured Parzen estimator."""
    sampler = optuna.samplers.TPESampler(seed=problem.seed, n_startup_trials=_startup(problem), constant_liar=True)
    return _asking(sampler, problem)


def nsga2(problem: Problem) -> Strategy:
    """Ask Optuna's NSGA-II."""
    return _asking(optuna.samplers.NSGAIISampler(seed=problem.seed, population_size=20), problem)


def gp(problem: Problem) -> Strategy:
    """Ask Optuna's Gaussian process."""
    startup = _startup(problem)
    sampler = optuna.samplers.GPSampler(seed=problem.seed, n_startup_trials=startup, deterministic_objective=False)
    return _asking(sampler, problem)


def random(problem: Problem) -> Strategy:
    """Ask Optuna's random sampler."""
    return _asking(optuna.samplers.RandomSampler(seed=problem.seed), problem)


def surrogate_sampler(problem: Problem, settings: Settings | None = None) -> SurrogateSampler:
    """Make the project's own sampler for a problem."""
    space, drafting = problem.space, problem.drafting
    risk = with_compensated(problem.risk, unexplained_shares(problem.table))
    letters = {letter for own in space.genome_letters for letter in own if letter != RUN}

    def expected(genomes: Sequence[str], losses: Floats) -> Floats:
        assert drafting is not None
        steps = np.array([drafting.costs.step(space.candidate(genome).plan) for genome in genomes])
        return drafting.costs.expected(steps, np.clip(1.0 - losses, 0.0, 1.0))

    view = Space(
        letters=space.genome_letters,
        allows=space.allows,
        foresee=lambda genome: problem.foresee(space.candidate(genome)),
        draw=lambda random: None if (drawn := problem.feasible.draw(random)) is None else space.genome(drawn),
        to_params=lambda genome: parameters(space, space.candidate(genome)),
        from_params=lambda params: genome_of(space, params),
        distributions=distributions(space),
        expected=None if drafting is None else expected,
    )
    return SurrogateSampler(
        view,
        {letter: risk.values(letter) for letter in letters},
        -problem.limits.least_difference(1.0),
        seed=problem.seed,
        batch=problem.batch // problem.batch_parts,
        reserve=[space.genome(candidate) for candidate in problem.reserve if candidate in space],
        settings=settings,
    )


def _asking(sampler: optuna.samplers.BaseSampler, problem: Problem) -> Strategy:
    study = StudyStrategy(problem, sampler)
    return Bisection(problem, study) if problem.chains else study


def _startup(problem: Problem) -> int:
    return min(STARTUP, len(problem.seeds) or STARTUP)
