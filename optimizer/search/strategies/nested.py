"""Nested sets: the plans of a criterion that ranks layers. `skip-it` takes the job's own criterion.

Source of the criterion: Hartman et al., arXiv 2509.25584; how it becomes a risk stands in docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.search.problem import PlanList, Problem
from optimizer.search.seeds.nested import nested_sets
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.surrogate.encoding import RUN


def skip_it(problem: Problem) -> PlanList:
    """For every action the 1, 2, 3, ... layers that the job's criterion holds safest."""
    return PlanList(nested_sets(problem.space, problem.risk), problem, "skip-it")


def ranked(space: PlanSpace, risk: Risk, letter: str) -> tuple[Candidate, ...]:
    """Plans that apply one action, without compensation, to the 1, 2, 3, ... least risky layers."""
    order = [layer for layer in risk.order(letter) if letter in space.letters[layer]]
    return tuple(applied(space, order[:size], letter) for size in range(1, len(order) + 1))


def applied(space: PlanSpace, layers: Iterable[int], letter: str) -> Candidate:
    """The plan that takes one action at the given layers, without compensation."""
    chosen = set(layers)
    return space.candidate("".join(letter if layer in chosen else RUN for layer in range(space.num_layers)))


def published_risk(problem: Problem, criterion: str) -> Risk:
    """What a published criterion predicts from the job's measurements.

    Raises MeasurementError when what it reads was not measured.
    """
    return criteria.load(criterion).risk(problem.table)
