"""Proposals of one job: an Optuna study in memory that never proposes a plan twice.

The study holds no truth: results come from the evaluations in the database, and a resumed job rebuilds the study by
replaying them in the same order.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from optimizer.space import PlanSpace, touched
from workers.runtime import Action, SkipPlan

DUPLICATES_IN_A_ROW = 4
"""After so many proposals of plans already known, a local move takes the sampler's place for one proposal."""


def make_sampler(name: str, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    """The Optuna sampler of a job file's name; ``startup`` trials come before a model is fitted."""
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=False)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise ValueError(f"unknown sampler {name!r}")


class Proposals:
    """Ask for plans that were never asked for before, tell what came out.

    Deterministic: the same seed and the same results in the same order give the same proposals.
    """

    def __init__(self, space: PlanSpace, sampler: str, seed: int, seeds: Sequence[SkipPlan]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._random = random.Random(seed)
        self._queue = deque(seeds)
        self._distributions = {
            _name(layer): CategoricalDistribution(tuple(space.letters[layer])) for layer in space.free_layers
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                directions=["minimize", "minimize"], sampler=make_sampler(sampler, seed, min(10, len(seeds) or 10))
            )
        self._running: dict[str, optuna.trial.Trial] = {}
        self._known: set[str] = {SkipPlan.dense(space.num_layers).text}

    def ask(self, parents: Sequence[SkipPlan], risk_order: Sequence[int]) -> SkipPlan | None:
        """A plan that is new, or None when the space holds no other.

        ``parents`` are the plans to move from when the sampler only repeats itself (the front so far);
        ``risk_order`` lists layers from the least to the most risky, for repairing plans that touch too many.
        """
        while self._queue:
            plan = self._queue.popleft()
            if plan.text not in self._known and plan in self._space:
                return self._start(plan)
        for _ in range(DUPLICATES_IN_A_ROW):
            trial = self._study.ask(self._distributions)
            proposed = self._plan_of(trial.params)
            plan = self._repair(proposed, risk_order)
            if plan.text in self._known or plan not in self._space:
                self._study.tell(trial, state=TrialState.FAIL)
            elif plan == proposed:
                return self._register(plan, trial)
            else:
                self._study.tell(trial, state=TrialState.FAIL)
                return self._start(plan)
        fallback = self._local_move(parents) or self._first_unknown()
        return None if fallback is None else self._start(fallback)

    def tell(self, plan: SkipPlan, values: tuple[float, float] | None, constraints: Mapping[str, float]) -> None:
        """Report a plan's costs (latency ratio, accuracy drop), or None where its evaluation failed.

        ``constraints`` hold one number per constraint, met when at most 0.
        """
        trial = self._running.pop(plan.text)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for name, value in constraints.items():
            trial.set_constraint(name, value)
        self._study.tell(trial, values)

    def _start(self, plan: SkipPlan) -> SkipPlan:
        params = {_name(layer): plan[layer].value for layer in self._space.free_layers}
        self._study.enqueue_trial(params)
        return self._register(plan, self._study.ask(self._distributions))

    def _register(self, plan: SkipPlan, trial: optuna.trial.Trial) -> SkipPlan:
        self._known.add(plan.text)
        self._running[plan.text] = trial
        return plan

    def _plan_of(self, params: Mapping[str, Any]) -> SkipPlan:
        return SkipPlan.parse("".join(params.get(_name(layer), "R") for layer in range(self._space.num_layers)))

    def _repair(self, plan: SkipPlan, risk_order: Sequence[int]) -> SkipPlan:
        """Let the riskiest layers run again until no more are touched than allowed."""
        for layer in reversed(risk_order):
            if touched(plan) <= self._space.max_touched:
                break
            plan = plan.with_action(layer, Action.RUN)
        return plan

    def _local_move(self, parents: Sequence[SkipPlan]) -> SkipPlan | None:
        """A new plan that differs from one of ``parents`` in one or two layers, if a few throws find one."""
        free = self._space.free_layers
        for _ in range(100 if parents else 0):
            plan = self._random.choice(parents)
            for layer in self._random.sample(free, min(len(free), self._random.randint(1, 2))):
                other = [letter for letter in self._space.letters[layer] if letter != plan[layer].value]
                plan = plan.with_action(layer, Action(self._random.choice(other)))
            if plan.text not in self._known and plan in self._space:
                return plan
        return None

    def _first_unknown(self) -> SkipPlan | None:
        unknown: Iterable[SkipPlan] = (plan for plan in self._space.enumerate() if plan.text not in self._known)
        return next(iter(unknown), None)


def _name(layer: int) -> str:
    return f"layer_{layer:03d}"
