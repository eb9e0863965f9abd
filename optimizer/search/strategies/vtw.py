"""Visual token withdrawal (Lin et al., arXiv 2405.05803): vision tokens leave for good at one layer K.

The paper picks the smallest K whose mean divergence stays under a threshold; every K is one setting of it.
"""

from __future__ import annotations

from optimizer.search.problem import PlanList, Problem
from optimizer.search.strategies.needs import need_action
from optimizer.search.strategies.nested import applied
from workers.runtime.plan import Action


def vtw(problem: Problem) -> PlanList:
    """Withdrawal from the last layer on, from the last but one on, and so on."""
    need_action(problem, "vtw", Action.BYPASS.letter)
    space = problem.space
    plans = [
        applied(space, range(first, space.num_layers), Action.BYPASS.letter)
        for first in range(space.num_layers - 1, -1, -1)
    ]
    return PlanList(plans, problem, "vtw")
