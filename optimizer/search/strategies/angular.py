"""Angular blocks (Gromov et al., arXiv 2403.17887): remove the n layers over which the last state turns least."""

from __future__ import annotations

from optimizer.criteria.angular import Angular
from optimizer.search.problem import PlanList, Problem
from optimizer.search.strategies.needs import need_blocks, need_plain_skips
from optimizer.search.strategies.nested import applied
from optimizer.search.surrogate.encoding import SKIP


def angular(problem: Problem) -> PlanList:
    """The method for every block length n."""
    need_plain_skips(problem, "angular")
    need_blocks(problem, "angular")
    space, criterion = problem.space, Angular()
    blocks = [criterion.best_block(problem.table, length) for length in range(1, space.num_layers)]
    return PlanList([applied(space, block, SKIP) for block in blocks], problem, "angular")
