"""A strategy that asks an Optuna sampler: a study in memory that never proposes a candidate twice.

The study holds no truth: results come from the evaluations in the database, and a resumed job rebuilds the study by
replaying them in the same order.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from optimizer.search.problem import Answer, Ask, Problem
from optimizer.search.space import COMPENSATED, RUN, SKIP, Candidate, PlanSpace
from optimizer.search.surrogate.moves import Moves
from optimizer.search.trial import Trial, front_of
from workers.messages import NO_COMPENSATION

DUPLICATES_IN_A_ROW = 4
"""After so many proposals of plans already known, a local move takes the sampler's place for one proposal."""
COMPENSATION = "compensation"


class StudyStrategy:
    """Ask an Optuna sampler for candidates that were never asked for before, after the problem's own seeds."""

    asks_ahead = True

    def __init__(self, problem: Problem, sampler: optuna.samplers.BaseSampler) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._problem, self._sampler = problem, sampler
        self._random = np.random.default_rng([problem.seed, 1])
        self._queue = deque(problem.seeds)
        self._distributions = distributions(problem.space)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        self._running: dict[Candidate, optuna.trial.Trial] = {}
        self._known: set[Candidate] = set()
        self._trials: list[Trial] = []

    @property
    def done(self) -> str:
        listed = self._problem.space.is_listed
        return "every possible plan was tried" if listed else "no further plan within the limits was found"

    @property
    def expected_gain(self) -> float | None:
        gain: float | None = getattr(self._sampler, "expected_gain", None)
        return gain

    def start(self, dense: Trial) -> None:
        """Enter the dense model and the trials of earlier jobs as finished trials."""
        for known in (dense, *self._problem.known):
            self._known.add(known.candidate)
            if known.candidate not in self._problem.space:
                continue
            self._study.add_trial(
                create_trial(
                    params=self._parameters(known.candidate),
                    distributions=self._distributions,
                    values=list(known.costs),
                    user_attrs=attributes(known),
                    constraints=self._problem.limits.values(known),
                )
            )
            self._trials.append(known)

    def begin_with(self, seeds: Sequence[Candidate]) -> None:
        """Put seeds before those that still wait."""
        self._queue.extendleft(reversed(seeds))

    def ask(self, count: int) -> Sequence[Ask]:
        """Return at most ``count`` candidates that are new; fewer when the space holds no other."""
        batch: list[Ask] = []
        while len(batch) < count:
            candidate = self._next()
            if candidate is None:
                break
            batch.append(Ask(candidate))
        return batch

    def tell(self, answers: Sequence[Answer]) -> None:
        """Tell the study costs and constraints; a failed evaluation is a failed trial."""
        for candidate, trial in answers:
            running = self._running.pop(candidate)
            if trial is None:
                self._study.tell(running, state=TrialState.FAIL)
                continue
            for name, value in self._problem.limits.values(trial).items():
                running.set_constraint(name, value)
            for name, figure in attributes(trial).items():
                running.set_user_attr(name, figure)
            self._study.tell(running, trial.costs)
            self._trials.append(trial)

    def _next(self) -> Candidate | None:
        while self._queue:
            candidate = self._queue.popleft()
            if candidate not in self._known and candidate in self._problem.space:
                return self._start(candidate)
        for _ in range(DUPLICATES_IN_A_ROW):
            trial = self._study.ask(self._distributions)
            proposed = self._candidate(trial.params)
            nearest = self._problem.feasible.nearest(proposed, self._problem.risk)
            if nearest is None or nearest in self._known:
                self._study.tell(trial, state=TrialState.FAIL)
            elif nearest == proposed:
                return self._register(proposed, trial)
            else:
                self._study.tell(trial, state=TrialState.FAIL)
                return self._start(nearest)
        fallback = self._local_move() or self._drawn() or self._first_unknown()
        return None if fallback is None else self._start(fallback)

    def _start(self, candidate: Candidate) -> Candidate:
        self._study.enqueue_trial(self._parameters(candidate))
        trial = self._study.ask(self._distributions)
        if isinstance(self._sampler, optuna.samplers.NSGAIISampler):
            # A trial whose parameters are given is not sampled, and without this it would belong to no generation.
            self._sampler.get_trial_generation(self._study, self._study.get_trials(deepcopy=False)[trial.number])
        return self._register(candidate, trial)

    def _register(self, candidate: Candidate, trial: optuna.trial.Trial) -> Candidate:
        self._known.add(candidate)
        self._running[candidate] = trial
        return candidate

    def _parameters(self, candidate: Candidate) -> dict[str, str]:
        return parameters(self._problem.space, candidate)

    def _candidate(self, params: Mapping[str, Any]) -> Candidate:
        return self._problem.space.candidate(genome_of(self._problem.space, params))

    def _local_move(self) -> Candidate | None:
        """Return a new plan that differs from one of the front in one or two layers, if a few attempts find one."""
        space = self._problem.space
        moves = Moves(space.genome_letters, space.allows, self._random)
        front = front_of(self._trials)
        for _ in range(100):
            parent = space.genome(front[int(self._random.integers(len(front)))].candidate)
            genome = moves.change(parent, int(self._random.integers(1, 3)))
            candidate = None if genome is None else space.candidate(genome)
            if candidate is not None and candidate not in self._known and candidate in self._problem.feasible:
                return candidate
        return None

    def _drawn(self) -> Candidate | None:
        """Return a new random plan within the limits, if a few attempts find one."""
        for _ in range(DUPLICATES_IN_A_ROW):
            candidate = self._problem.feasible.draw(self._random)
            if candidate is not None and candidate not in self._known:
                return candidate
        return None

    def _first_unknown(self) -> Candidate | None:
        """Return the first new plan of a space that is small enough to be listed."""
        if not self._problem.space.is_listed:
            return None
        every = self._problem.space.enumerate()
        return next((each for each in every if each not in self._known and each in self._problem.feasible), None)


def distributions(space: PlanSpace) -> dict[str, BaseDistribution]:
    """Optuna's parameters: one per layer that has a choice, and one for the compensation where there are two."""
    found: dict[str, BaseDistribution] = {
        _name(layer): CategoricalDistribution(tuple(space.letters[layer])) for layer in space.free_layers
    }
    if len(space.compensations) > 1:
        found[COMPENSATION] = CategoricalDistribution(space.compensations)
    return found


def parameters(space: PlanSpace, candidate: Candidate) -> dict[str, str]:
    """Write a candidate as Optuna's parameters."""
    params = {_name(layer): candidate.plan[layer].letter for layer in space.free_layers}
    if len(space.compensations) > 1:
        params[COMPENSATION] = candidate.compensation
    return params


def genome_of(space: PlanSpace, params: Mapping[str, Any]) -> str:
    """Read a genome from Optuna's parameters."""
    text = "".join(params.get(_name(layer), RUN) for layer in range(space.num_layers))
    compensated = params.get(COMPENSATION, space.compensations[0]) != NO_COMPENSATION
    return text.replace(SKIP, COMPENSATED) if compensated else text


def attributes(trial: Trial) -> dict[str, Any]:
    """User attributes of Optuna's trial: what a sampler may want to know beside the costs."""
    names = ("n_samples", "difference", "difference_error", "kl", "kl_error")
    return {name: getattr(trial, name) for name in names}


def _name(layer: int) -> str:
    return f"layer_{layer:03d}"
