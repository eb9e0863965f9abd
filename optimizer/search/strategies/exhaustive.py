"""Every plan of a space, plans that touch few layers first."""

from __future__ import annotations

from optimizer.errors import UsageFault
from optimizer.search.problem import PlanList, Problem
from optimizer.search.space import MOST_LISTED, touched


def exhaustive(problem: Problem) -> PlanList:
    """The whole space. Raises UsageFault where it is too large to be listed."""
    space = problem.space
    if not space.is_listed:
        raise UsageFault(
            f"search.strategy: exhaustive would try {space.size * len(space.compensations):.3g} plans; at most "
            f"{MOST_LISTED} are possible (protect layers, or allow fewer actions)"
        )
    plans = sorted(space.enumerate(), key=lambda candidate: (touched(candidate.plan), candidate))
    return PlanList(plans, problem, "the space")
