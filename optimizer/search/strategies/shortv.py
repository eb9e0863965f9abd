"""ShortV (Yuan et al., arXiv 2504.00502): freeze vision tokens at the layers of least contribution (KL)."""

from __future__ import annotations

from optimizer.search.problem import PlanList, Problem
from optimizer.search.strategies.needs import need_action
from optimizer.search.strategies.nested import published_risk, ranked
from workers.runtime.plan import Action


def shortv(problem: Problem) -> PlanList:
    """The method for every number of layers."""
    need_action(problem, "shortv", Action.FREEZE.letter)
    plans = ranked(problem.space, published_risk(problem, "layer-contribution"), Action.FREEZE.letter)
    return PlanList(plans, problem, "shortv")
