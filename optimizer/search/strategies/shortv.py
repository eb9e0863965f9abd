"""ShortV (Yuan et al., arXiv 2504.00502): freeze vision tokens at the layers of least contribution (KL)."""

from __future__ import annotations

from optimizer.search.problem import PlanList, Problem
from optimizer.search.strategies.needs import need_action
from optimizer.search.strategies.nested import published_risk, ranked


def shortv(problem: Problem) -> PlanList:
    """The method for every number of layers."""
    need_action(problem, "shortv", "F")
    plans = ranked(problem.space, published_risk(problem, "layer-contribution"), "F")
    return PlanList(plans, problem, "shortv")
