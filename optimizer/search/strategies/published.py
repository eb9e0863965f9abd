"""Published methods whose plans follow from measurements alone, and what their problems must offer."""

from __future__ import annotations

from collections.abc import Iterable

from optimizer import criteria
from optimizer.criteria.interface import known_values
from optimizer.criteria.published import Angular
from optimizer.errors import UsageFault
from optimizer.search.problem import PlanList, Problem
from optimizer.search.seeds.nested import nested_sets
from optimizer.search.space import COMPENSATED, MOST_LISTED, RUN, SKIP, Candidate, PlanSpace, touched
from workers.errors import MeasurementError
from workers.runtime import Action

KINDS = {
    "shortgpt": ("distance",),
    "angular": ("angular",),
    "replaceme": ("angular",),
    "shortv": ("causal",),
    "knapspec": ("angular",),
    "llm-drop": ("operators",),
}
"""Kinds of measurement that a method reads beside the job's criterion."""

SUBLAYER_ACTIONS = (Action.SKIP_ATTENTION, Action.SKIP_MLP)
VISION_SUBLAYER_ACTIONS = (Action.FREEZE_ATTENTION, Action.FREEZE_MLP)


def skip_it(problem: Problem) -> PlanList:
    """Apply every action to the 1, 2, 3, ... layers that the job's criterion holds safest.

    Source of the criterion: Hartman et al., arXiv 2509.25584; how it becomes a risk stands in docs/theory.md.
    """
    return PlanList(nested_sets(problem.space, problem.risk), problem, "skip-it")


def shortgpt(problem: Problem) -> PlanList:
    """Remove the layers of least Block Influence, for every number of layers.

    Source: Men et al., "ShortGPT", arXiv 2403.03853.
    """
    need_plain_skips(problem, "shortgpt")
    return _least_risky(problem, "shortgpt", "block-influence", SKIP)


def shortv(problem: Problem) -> PlanList:
    """Freeze vision tokens at the layers of least contribution (KL), for every number of layers.

    Source: Yuan et al., "ShortV", arXiv 2504.00502.
    """
    _need_action(problem, "shortv", Action.FREEZE)
    return _least_risky(problem, "shortv", "layer-contribution", Action.FREEZE.letter)


def angular(problem: Problem) -> PlanList:
    """Remove the n consecutive layers over which the last token's state turns least, for every n.

    Source: Gromov et al., arXiv 2403.17887.
    """
    need_plain_skips(problem, "angular")
    need_blocks(problem, "angular")
    blocks = [Angular.best_block(problem.table, length) for length in range(1, problem.space.num_layers)]
    return PlanList([applied(problem.space, block, SKIP) for block in blocks], problem, "angular")


def replaceme(problem: Problem) -> PlanList:
    """Replace the n consecutive layers whose input and output are closest by a map folded into the weights.

    The map itself is fitted when a plan is evaluated (see docs/compensation.md). Source: Shopkhoev et al.,
    "ReplaceMe", arXiv 2505.02819.
    """
    _need_action(problem, "replaceme", Action.SKIP)
    if problem.space.recipe is None:
        raise UsageFault("search.strategy: replaceme compensates what it skips (compensation: linear or both)")
    need_blocks(problem, "replaceme")
    layers, plans = problem.space.num_layers, []
    for length in range(1, layers - 1):
        # A block at the very bottom has no layer before it that could hold the map; the next one up takes its place.
        start = max(1, Angular.best_block(problem.table, length).start)
        plans.append(applied(problem.space, range(start, min(layers, start + length)), COMPENSATED))
    return PlanList(plans, problem, "replaceme")


def llm_drop(problem: Problem) -> PlanList:
    """Leave out the attention and the MLPs that turn the states least, in one shot, for every number of them.

    The job's actions choose the method's form: skip_attention alone, skip_mlp alone, or both ranked in one list, where
    a layer that loses both is skipped. Source: He et al., "What Matters in Transformers?", arXiv 2406.15786.
    """
    need_sublayers(problem, "llm-drop")
    drops = [
        (value, action.letter, layer)  # attention first where both are alike, as in the paper's list
        for action in SUBLAYER_ACTIONS
        if any(action.letter in own for own in problem.space.letters)
        for layer, value in enumerate(known_values(problem.table, f"operator_distance@{action.row.leaves_out}", "all"))
    ]
    plan, plans = [RUN] * problem.space.num_layers, []
    for _, letter, layer in sorted(drops):
        letter = letter if plan[layer] == RUN else SKIP
        if letter in problem.space.letters[layer]:
            plan[layer] = letter
            plans.append(problem.space.candidate("".join(plan)))
    return PlanList(plans, problem, "llm-drop")


def vtw(problem: Problem) -> PlanList:
    """Withdraw the vision tokens for good from one layer on: the last, the last but one, and so on.

    The paper picks the smallest such layer whose mean divergence stays under a threshold; every layer is one setting
    of it. Source: Lin et al., "VTW", arXiv 2405.05803.
    """
    _need_action(problem, "vtw", Action.BYPASS)
    layers, letter = problem.space.num_layers, Action.BYPASS.letter
    plans = [applied(problem.space, range(first, layers), letter) for first in range(layers - 1, -1, -1)]
    return PlanList(plans, problem, "vtw")


def exhaustive(problem: Problem) -> PlanList:
    """Try the whole space, plans that touch few layers first. Raises UsageFault where it is too large to be listed."""
    space = problem.space
    if not space.is_listed:
        raise UsageFault(
            f"search.strategy: exhaustive would try {space.size * len(space.compensations):.3g} plans; at most "
            f"{MOST_LISTED} are possible (protect layers, or allow fewer actions)"
        )
    plans = sorted(space.enumerate(), key=lambda candidate: (touched(candidate.plan), candidate))
    return PlanList(plans, problem, "the space")


def published_chains(problem: Problem) -> tuple[tuple[Candidate, ...], ...]:
    """Return the plans of every published method that the job's actions and measurements allow, method by method."""
    found = []
    for method in (shortgpt, angular, shortv, vtw, replaceme, llm_drop):
        try:
            found.append(method(problem).plans)
        except (UsageFault, MeasurementError):
            continue  # the job lacks the action, or its criterion did not need the measurement
    return tuple(found)


def applied(space: PlanSpace, layers: Iterable[int], letter: str) -> Candidate:
    """Return the plan that takes one action (or ``C``, a compensated skip) at the given layers."""
    chosen = set(layers)
    return space.candidate("".join(letter if layer in chosen else RUN for layer in range(space.num_layers)))


def need_plain_skips(problem: Problem, strategy: str) -> None:
    """Refuse a job without plain skips. Raises UsageFault."""
    _need_action(problem, strategy, Action.SKIP)
    if not any(SKIP in own for own in problem.space.genome_letters):
        raise UsageFault(f"search.strategy: {strategy} skips without compensation (compensation: none or both)")


def need_sublayers(problem: Problem, strategy: str) -> None:
    """Refuse a job that leaves out neither attention nor MLPs, or both but no layer as a whole. Raises UsageFault."""
    if _parts_named(problem, strategy, SUBLAYER_ACTIONS, Action.SKIP) > 1:
        need_plain_skips(problem, strategy)  # a layer that loses both is skipped


def need_vision_sublayers(problem: Problem, strategy: str) -> None:
    """Refuse a job that freezes neither attention nor MLPs alone, or both but no layer. Raises UsageFault."""
    if _parts_named(problem, strategy, VISION_SUBLAYER_ACTIONS, Action.FREEZE) > 1:
        _need_action(problem, strategy, Action.FREEZE)


def _parts_named(problem: Problem, strategy: str, parts: tuple[Action, ...], whole: Action) -> int:
    """Return how many of the actions on parts of a layer a job has, of which it needs one. Raises UsageFault."""
    named = sum(any(action.letter in own for own in problem.space.letters) for action in parts)
    if not named:
        raise UsageFault(
            f"search.strategy: {strategy} needs an action that leaves out a part of a layer "
            f"(actions: [{', '.join(action.label for action in (*parts, whole))}])"
        )
    return named


def _need_action(problem: Problem, strategy: str, action: Action) -> None:
    if not any(action.letter in own for own in problem.space.letters):
        raise UsageFault(f"search.strategy: {strategy} needs the action {action.label} (actions: [{action.label}])")


def need_blocks(problem: Problem, strategy: str) -> None:
    """Refuse a job without angular distances of blocks. Raises MeasurementError."""
    if not problem.table.has("angular_distance@1", "last"):
        raise MeasurementError(f"{strategy} needs the angular distances of blocks of layers, which were not measured")


def _least_risky(problem: Problem, strategy: str, criterion: str, letter: str) -> PlanList:
    """Plans that take one action, without compensation, at the 1, 2, 3, ... layers that a criterion holds safest."""
    risk = criteria.load(criterion).risk(problem.table)
    order = [layer for layer in risk.order(letter) if letter in problem.space.letters[layer]]
    plans = [applied(problem.space, order[:size], letter) for size in range(1, len(order) + 1)]
    return PlanList(plans, problem, strategy)
