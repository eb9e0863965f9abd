"""ShortGPT (Men et al., arXiv 2403.03853): remove the layers of least Block Influence."""

from __future__ import annotations

from optimizer.search.problem import PlanList, Problem
from optimizer.search.strategies.needs import need_plain_skips
from optimizer.search.strategies.nested import published_risk, ranked
from optimizer.search.surrogate.encoding import SKIP


def shortgpt(problem: Problem) -> PlanList:
    """The method for every number of layers."""
    need_plain_skips(problem, "shortgpt")
    plans = ranked(problem.space, published_risk(problem, "block-influence"), SKIP)
    return PlanList(plans, problem, "shortgpt")
