"""The plans that meet every constraint which needs no evaluation: whether there are any, and the one nearest to a plan.

Predicted latency and cache are sums over a plan's steps, so each of these questions is a small integer program. The
sums are read off the constraints themselves, at plans of a single step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from optimizer.criteria import Risk
from optimizer.search.constraints import Limits
from optimizer.search.latency import Ratio
from optimizer.search.seeds.additive import AdditiveProblem, Limit, Step, action_of, steps_of
from optimizer.search.space import RUN, Candidate, PlanSpace
from workers.runtime import SkipPlan

TIE = 1e-3
"""Weight of the riskiest steps beside one changed layer, when the nearest plan is looked for."""
SLACK = 1e-5
"""By how much a sum is kept below its limit where the solver's own tolerance would carry a plan beyond it."""


@dataclass(frozen=True)
class FeasiblePlans:
    """The part of a space that a job's foreseeable constraints leave."""

    space: PlanSpace
    limits: Limits
    ratio: Ratio
    """Predicted latency as a share of dense."""

    def __contains__(self, candidate: Candidate) -> bool:
        return self.limits.feasible(candidate.plan, self.ratio(candidate.plan))

    @cached_property
    def sums(self) -> dict[str, Limit]:
        """The constraints by name; that on touched layers is the space's own."""
        dense = SkipPlan.dense(self.space.num_layers)
        at_dense = self._known(dense)
        by_step = {step: self._known(dense.with_action(step[0], action_of(step))) for step in steps_of(self.space)}
        return {
            name: Limit({step: known[name] - value for step, known in by_step.items()}, -value)
            for name, value in at_dense.items()
            if name != "max_layers_touched"
        }

    def out_of_reach(self) -> str | None:
        """Why no plan of the space meets the constraints, or None where one does."""
        if not self.sums or self._open:
            return None
        for name, limit in self.sums.items():
            amounts = [{step: limit.amount[step] for step in steps_of(part)} for part in self.space.parts]
            problems = [AdditiveProblem(part, own, {}) for part, own in zip(self.space.parts, amounts, strict=True)]
            nearest = [each.plan for problem in problems if (each := problem.solve()) is not None]
            least = min(self._known(plan)[name] for plan in (SkipPlan.dense(self.space.num_layers), *nearest))
            if least > 0:
                return self.limits.missed(name, least)
        return f"no plan meets {' and '.join(self.sums)} at once"

    def nearest(self, candidate: Candidate, risk: Risk) -> Candidate | None:
        """Return the plan within the constraints that differs from ``candidate`` in the fewest layers, or None.

        Among equally near ones it is that of the least total risk.
        """
        if candidate in self.space and candidate in self:
            return candidate
        wanted = self.space.genome(candidate)
        own = (each for each in self.space.parts if candidate.compensation in each.compensations)
        part = next(own, self.space.parts[0])  # a plan without skips is said without compensation everywhere
        risks = {(layer, letter): risk.of(layer, action_of((layer, letter)).letter) for layer, letter in steps_of(part)}
        finite = [value for value in risks.values() if math.isfinite(value)]
        most = max(finite, default=0.0) or 1.0
        cost = {
            (layer, letter): float(wanted[layer] == RUN) - float(wanted[layer] == letter) + TIE * min(1.0, own / most)
            for (layer, letter), own in risks.items()
        }
        return self._cheapest(part, cost)

    def draw(self, random: np.random.Generator) -> Candidate | None:
        """Return a random plan that meets the constraints: the least sum of random costs, which may be negative."""
        if not self._open:
            return None
        part = self._open[int(random.integers(len(self._open)))]
        shift = float(random.uniform(-1.0, 1.0))
        return self._cheapest(part, {step: shift + float(random.standard_normal()) for step in steps_of(part)})

    @cached_property
    def _open(self) -> tuple[PlanSpace, ...]:
        """The parts that hold a plan within the constraints."""
        return tuple(part for part in self.space.parts if self._cheapest(part, {}) is not None)

    def _cheapest(self, part: PlanSpace, cost: dict[Step, float]) -> Candidate | None:
        costs = {step: cost.get(step, 0.0) for step in steps_of(part)}
        for slack in (0.0, SLACK):
            limits = tuple(Limit(limit.amount, limit.most - slack) for limit in self.sums.values())
            found = AdditiveProblem(part, costs, {}, limits=limits).solve()
            if found is None or found in self:
                return found
        return None

    def _known(self, plan: SkipPlan) -> dict[str, float]:
        return self.limits.known(plan, self.ratio(plan))
