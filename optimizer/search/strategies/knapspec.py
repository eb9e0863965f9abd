"""KnapSpec: for every budget of saved latency the layers whose removal turns the hidden state least.

Source: "KnapSpec: Self-Speculative Decoding via Adaptive Layer Selection as a Knapsack Problem", arXiv 2602.20217.

The paper chooses among attention and MLP sublayers while it serves: a knapsack of latencies whose value is the cosine
between the hidden state with and without the skipped ones, which it shows to bound the acceptance of drafts; the fill
with the most tokens per time drafts. Here the items are whole layers, their weights the job's latency profile. The
cosine of a plan is the product of those of its gaps, each measured between the dense model's states at its two ends,
where the paper computes the states that skipping leads to. Every fill is evaluated, and the search's own figures say
which is best. The first and the last layer are kept, and at most half of the time is saved, as in the authors' code.
"""

from __future__ import annotations

import math

from optimizer.search.problem import PlanList, Problem
from optimizer.search.space import SKIP
from optimizer.search.strategies.published import applied, need_blocks, need_plain_skips
from workers.runtime import SkipPlan
from workers.runtime.plan import Action

LEAST_COSINE = 0.5
"""Plans below are no drafters; the authors' code drops them, too."""
MOST_UNITS = 5
"""Weight of the heaviest layer, in units of the lightest."""

Fill = tuple[float, tuple[int, ...]]
"""Logarithm of the cosine, and the skipped layers."""


def knapspec(problem: Problem) -> PlanList:
    """Return the best fill of each budget, the least first. Raises as published methods do."""
    need_plain_skips(problem, "knapspec")
    need_blocks(problem, "knapspec")
    layers = problem.space.num_layers
    weights = _weights(problem)
    budget = sum(weights) // 2
    # kept[n][j]: the best fill of the first n layers that saves j units and keeps layer n - 1
    kept: list[dict[int, Fill]] = [{} for _ in range(layers + 1)]
    kept[1][0] = (0.0, ())
    for end in range(1, layers):  # layer `end` is kept, behind another one or behind a gap
        for start in range(1, end + 1):
            gap = range(start, end)
            if not all(SKIP in problem.space.letters[layer] for layer in gap):
                continue
            turned, saved = _log_cosine(problem, gap), sum(weights[layer] for layer in gap)
            for units, (value, skipped) in kept[start].items():
                fill = (value + turned, (*skipped, *gap))
                other = kept[end + 1].get(units + saved, (-math.inf, ()))
                if units + saved <= budget and fill[0] >= math.log(LEAST_COSINE):
                    kept[end + 1][units + saved] = max(other, fill, key=lambda each: each[0])
    fills = [kept[layers][units][1] for units in sorted(kept[layers])]
    return PlanList([applied(problem.space, fill, SKIP) for fill in fills if fill], problem, "knapspec")


def _weights(problem: Problem) -> list[int]:
    """Return what skipping each layer saves, in units of the lightest layer."""
    layers = problem.space.num_layers
    run, skip = Action.RUN.letter, Action.SKIP.letter
    plans = ["".join(skip if each == layer else run for each in range(layers)) for layer in range(layers)]
    saved = [1.0 - problem.ratio(SkipPlan.parse(plan)) for plan in plans]
    lightest = min((each for each in saved if each > 0.0), default=1.0)
    return [min(MOST_UNITS, max(1, round(each / lightest))) for each in saved]


def _log_cosine(problem: Problem, gap: range) -> float:
    """Logarithm of the cosine between the states at both ends of a gap, from their measured angle over pi."""
    if not gap:
        return 0.0
    row = problem.table.row(f"angular_distance@{len(gap)}", "last", gap.start)
    cosine = math.cos(math.pi * row.value) if row is not None else 0.0
    return math.log(cosine) if cosine > 0.0 else -math.inf
