"""Fit the maps of one plan's gaps from the bottom up, through the model's own forward.

Every map is fitted on the states that the pruned, already compensated model really has: for each gap the calibration
batches run up to the layer before it, under the maps of the gaps below. Only [hidden, hidden] sums are held beside one
layer's states. This works for every family; where layers can be called one at a time,
:mod:`workers.compensation.shared` finds the same maps from fewer layer executions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.layerwise.hooks import Hooks, hidden_of, with_hidden
from workers.messages import GapShare
from workers.runtime.applied import AppliedPlan
from workers.runtime.folding import (
    ActedOn,
    FoldingError,
    GapMap,
    acted_on,
    fold_site,
    require_projection,
)
from workers.runtime.gaps import Gap, Scope, gaps
from workers.runtime.locate import DecoderStack, locate
from workers.runtime.plan import SkipPlan
from workers.runtime.token_rows import TokenSplit

from .calibration import Calibration, CalibrationBatch
from .recipe import CompensationError, Recipe
from .sums import GapSums, Solution, solve
from .weighting import Weigh, weigher


@dataclass(frozen=True)
class Fitted:
    """The maps of a plan, and how well they fit."""

    plan: str
    compensation: str
    maps: dict[int, GapMap]
    gaps: tuple[GapShare, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class GapStates:
    """One batch behind the layer before a gap.

    ``acted_on`` ``[batch * tokens, width]`` is what the map acts on (M, or the input of the projection that makes it,
    times the layer's share), ``state`` ``[batch * tokens, hidden]`` the layer's output.
    """

    acted_on: Tensor
    state: Tensor


def fit(model: nn.Module, calibration: Calibration, plan: SkipPlan, recipe: Recipe) -> Fitted:
    """Fit the maps of ``plan``'s gaps. The model is left as it was; it must have no plan applied.

    Raises :class:`CompensationError` when a layer before a gap cannot hold a map, with the reason.
    """
    started = time.perf_counter()
    require_source(plan, recipe)
    open_gaps = gaps(plan, drift=recipe.drift)
    shares = {gap: calibration.require(gap.layer, gap.part) for gap in open_gaps}
    stack = locate(model)
    for gap in open_gaps:
        require_holds(stack, gap, recipe)
    weigh = weigher(recipe.weighting, calibration)
    maps: dict[int, GapMap] = {}
    found: list[GapShare] = []
    applied = AppliedPlan(model, plan if recipe.source == "pruned" else SkipPlan.dense(len(plan)))
    with _Passes(stack, applied, calibration.batches, shares, recipe.scope) if open_gaps else nullcontext() as passes:
        for gap in open_gaps:
            assert passes is not None
            own, quality = fit_gap(passes.states_at(gap.layer), calibration, gap, recipe, weigh)
            maps[gap.layer] = own
            found.append(quality)
            passes.changes[gap.layer] = change_of(own, calibration.device) if recipe.source == "pruned" else None
    return Fitted(plan.text, recipe.text, maps, tuple(found), calibration.kept, time.perf_counter() - started)


def fit_gap(
    states: Sequence[GapStates], calibration: Calibration, gap: Gap, recipe: Recipe, weigh: Weigh
) -> tuple[GapMap, GapShare]:
    """Fit one gap's map on the states of all batches; the map is kept in float32 on the CPU."""
    parts = []
    for own, batch in zip(states, calibration.batches, strict=True):
        target = batch.targets[gap.end]
        residual = batch.wanted(gap.layer, gap.end) - own.state[batch.kept].double()
        parts.append(GapSums.of(own.acted_on[batch.kept], residual, target, weigh(batch, target)))
    sums = GapSums.merge(parts)
    solution = solve(sums, ridge=recipe.ridge)
    fitted = _gap_map(gap, solution, calibration.require(gap.layer, gap.part), recipe.scope)
    return fitted, GapShare(gap.layer, gap.end, sums.plain_share, solution.unexplained)


def change_of(own: GapMap, device: torch.device) -> Tensor:
    """Matrix from what a map acts on to its change of the state, ``[hidden or width, hidden]``, float32 on a device."""
    return own.change.float().to(device)


def require_source(plan: SkipPlan, recipe: Recipe) -> None:
    """Raise :class:`CompensationError` where maps for missing parts would be fitted on states that have them."""
    layer = next((layer for layer, action in enumerate(plan) if action.row.removes_part), None)
    if layer is not None and recipe.source == "dense":
        raise CompensationError(
            f"layer {layer}: {plan[layer].letter} ({plan[layer].label}) is not compensated with source dense; take "
            "source pruned"
        )


def require_holds(stack: DecoderStack, gap: Gap, recipe: Recipe) -> None:
    """Raise :class:`CompensationError` unless the layer before a gap can hold a map of this recipe."""
    try:
        site = fold_site(stack, gap.layer, gap.part)
        if recipe.scope == "projection":
            require_projection(site, gap.layer)
    except FoldingError as error:
        raise CompensationError(str(error)) from None


def _gap_map(gap: Gap, solution: Solution, share: float, scope: Scope) -> GapMap:
    matrix = solution.change
    if scope == "output":
        matrix = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device) + matrix
    return GapMap(gap.layer, gap.end, matrix.float().cpu(), share, scope, gap.part)


class _Reached(BaseException):
    """Ends a forward pass at the layer whose states are wanted; no Exception, so that model code does not catch it."""


class _Passes:
    """The calibration batches' forward passes through the decoder under a plan, each up to a layer before a gap.

    ``changes`` holds, by layer, the matrix of the map that is in place there (None: states are left as they are).
    """

    def __init__(
        self,
        stack: DecoderStack,
        applied: AppliedPlan,
        batches: Sequence[CalibrationBatch],
        shares: dict[Gap, float],
        scope: Scope,
    ) -> None:
        self._stack, self._applied, self._batches, self._shares = stack, applied, batches, shares
        self._scope: Scope = scope
        self._hooks = ExitStack()
        self.changes: dict[int, Tensor | None] = {}
        self._batch = batches[0]
        self._found: list[GapStates] = []

    def __enter__(self) -> _Passes:
        with Hooks() as hooks:
            for gap, share in self._shares.items():
                watched = acted_on(fold_site(self._stack, gap.layer, gap.part), self._scope, gap.layer)
                hooks.enter_context(watched)
                hooks.after(self._stack.layers[gap.layer], partial(self._behind, gap.layer, share, watched))
            hooks.enter_context(self._applied)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def states_at(self, layer: int) -> list[GapStates]:
        """Run every batch up to a layer that has no change yet."""
        self._found = []
        for batch in self._batches:
            self._batch = batch
            if self._applied.plan.needs_vision_tokens:
                self._applied.vision_mask = batch.vision
            with torch.inference_mode(), suppress(_Reached):
                self._stack.owner(*batch.args, **batch.kwargs)
        if len(self._found) != len(self._batches):
            raise CompensationError(f"layer {layer} did not run once in every forward pass, so no map can be fitted")
        return self._found

    def _behind(self, layer: int, share: float, watched: ActedOn, output: Any) -> Any:
        """Behind a layer before a gap: put its map in place, or end the pass where it has none yet."""
        state = hidden_of(output)
        rows = on_all_tokens(watched.take_runs(), state, self._batch.vision) * share
        if layer not in self.changes:
            self._found.append(GapStates(rows, state.flatten(0, 1)))
            raise _Reached
        change = self.changes[layer]
        return None if change is None else with_hidden(output, changed_state(state, rows, change))


def changed_state(state: Tensor, acted_on: Tensor, change: Tensor) -> Tensor:
    """Return ``[batch, tokens, hidden]`` with a map's float32 matrix in place, rounded once to the state's dtype."""
    return (state.float() + (acted_on.float() @ change).view(state.shape)).to(state.dtype)


def on_all_tokens(runs: Sequence[Tensor], state: Tensor, vision: Tensor) -> Tensor:
    """Rows of a layer's runs for all tokens, ``[batch * tokens, width]``: zero for those that did not go through it.

    The runs, ``[rows, width]`` each, are one of all tokens, one of text, or one of text and one of vision tokens.
    """
    runs = [rows.to(state.device) for rows in runs]
    if len(runs) == 1 and len(runs[0]) == state.shape[0] * state.shape[1]:
        return runs[0]
    split = TokenSplit.from_vision_mask(vision)
    assert split is not None
    every = runs[0].new_zeros(*state.shape[:2], runs[0].shape[-1])
    for rows, part in zip(runs, (split.text, split.vision), strict=False):
        every = part.put(every, rows.view(part.batch, part.width, -1))
    return every.flatten(0, 1)
