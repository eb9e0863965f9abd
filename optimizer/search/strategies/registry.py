"""Making the strategy of a job file's name."""

from __future__ import annotations

from collections.abc import Callable

import optuna

from optimizer.errors import UsageFault
from optimizer.search.problem import Problem, Strategy
from optimizer.search.seeds.runs import unexplained_shares
from optimizer.search.seeds.theory import with_compensated
from optimizer.search.strategies import exhaustive, nested, sleb
from optimizer.search.strategies.angular import angular
from optimizer.search.strategies.bisection import Scouting
from optimizer.search.strategies.evopress import EvoPress
from optimizer.search.strategies.pairs import PairAware
from optimizer.search.strategies.replaceme import replaceme
from optimizer.search.strategies.shortgpt import shortgpt
from optimizer.search.strategies.shortv import shortv
from optimizer.search.strategies.study import StudyStrategy, distributions, genome_of, parameters
from optimizer.search.strategies.vtw import vtw
from optimizer.search.surrogate.sampler import Settings, Space, SurrogateSampler

STARTUP = 10
"""Trials before one of Optuna's model-based samplers fits its model."""

PUBLISHED: dict[str, Callable[[Problem], Strategy]] = {
    "skip-it": nested.skip_it,
    "shortgpt": shortgpt,
    "angular": angular,
    "replaceme": replaceme,
    "sleb": sleb.Sleb,
    "evopress": EvoPress,
    "shortv": shortv,
    "vtw": vtw,
    "exhaustive": exhaustive.exhaustive,
}


def make_strategy(name: str, problem: Problem, settings: Settings | None = None, *, pairs: int = 0) -> Strategy:
    """The strategy of that name on a problem; ``settings`` are the surrogate sampler's.

    A sampler's search begins with measuring ``pairs`` pairs of steps, where that is more than none.

    Raises UsageFault when the strategy needs an action or measurement that the problem does not have.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](problem)
    study = StudyStrategy(problem, _sampler(name, problem, settings))
    inner = Scouting(problem, study) if problem.ladders else study
    return PairAware(problem, inner, pairs) if pairs else inner


def _sampler(name: str, problem: Problem, settings: Settings | None) -> optuna.samplers.BaseSampler:
    seed, startup = problem.seed, min(STARTUP, len(problem.seeds) or STARTUP)
    if name == "surrogate":
        return surrogate(problem, settings)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=False)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise UsageFault(f"search.strategy: {name!r} is not known")


def surrogate(problem: Problem, settings: Settings | None = None) -> SurrogateSampler:
    """The project's own sampler on a problem."""
    space = problem.space
    view = Space(
        letters=space.genome_letters,
        allows=space.allows,
        foresee=lambda genome: problem.foresee(space.candidate(genome)),
        draw=lambda random: None if (thrown := problem.feasible.draw(random)) is None else space.genome(thrown),
        to_params=lambda genome: parameters(space, space.candidate(genome)),
        from_params=lambda params: genome_of(space, params),
        distributions=distributions(space),
    )
    return SurrogateSampler(
        view,
        with_compensated(problem.risk, unexplained_shares(problem.table)).risk,
        problem.limits.largest_drop(1.0),
        seed=problem.seed,
        batch=problem.batch,
        reserve=[space.genome(candidate) for candidate in problem.reserve if candidate in space],
        settings=settings,
    )
