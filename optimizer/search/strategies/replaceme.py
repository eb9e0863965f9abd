"""ReplaceMe (Shopkhoev et al., arXiv 2505.02819): one block of layers, replaced by a map folded into the weights.

The block of n layers is the one whose input and output are closest in cosine distance. The map itself is fitted when
the plan is evaluated (see docs/compensation.md).
"""

from __future__ import annotations

from optimizer.criteria.angular import Angular
from optimizer.search.problem import PlanList, Problem
from optimizer.search.space import Candidate
from optimizer.search.strategies.needs import need_blocks, need_compensation
from optimizer.search.surrogate.encoding import COMPENSATED, RUN


def replaceme(problem: Problem) -> PlanList:
    """The method for every block length n."""
    need_compensation(problem, "replaceme")
    need_blocks(problem, "replaceme")
    space, plans = problem.space, []
    for length in range(1, space.num_layers - 1):
        block = Angular().best_block(problem.table, length)
        plans.append(_compensated(problem, block))
    return PlanList(plans, problem, "replaceme")


def _compensated(problem: Problem, block: range) -> Candidate:
    layers = problem.space.num_layers
    # A block at the very bottom has no layer before it that could hold the map; the next one up takes its place.
    start = max(1, block.start)
    chosen = range(start, min(layers, start + len(block)))
    return problem.space.candidate("".join(COMPENSATED if layer in chosen else RUN for layer in range(layers)))
