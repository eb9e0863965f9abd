"""Fitting the maps of a plan's gaps, from the bottom up, in one pass over the calibration tokens.

Every batch's forward pass halts behind the layer before a gap; the states of all batches give the map; the passes go
on with it in place. So each map is fitted on the states that the pruned, already compensated model really has, no
layer is executed twice, and only [hidden, hidden] sums are held beside the states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.runtime.applied import AppliedPlan
from workers.runtime.folding import (
    FoldingError,
    GapMap,
    OutputSum,
    ProjectionInput,
    acted_on,
    fold_site,
    require_bias,
    require_projection,
)
from workers.runtime.gaps import Gap, Scope, gaps
from workers.runtime.locate import DecoderStack, locate
from workers.runtime.plan import SkipPlan
from workers.runtime.token_rows import TokenSplit

from .calibration import Calibration, CalibrationBatch
from .lockstep import HaltingCall
from .recipe import CompensationError, Recipe
from .sums import GapSums, Solution, solve
from .weighting import Weigh


@dataclass(frozen=True)
class FittedGap:
    """How well a gap could be repaired: shares of the target's energy left unexplained on the calibration tokens."""

    layer: int
    end: int
    plain_share: float
    """By the plain skip of this gap, those below it being compensated."""
    unexplained: float
    """By the best map."""


@dataclass(frozen=True)
class Fitted:
    """The maps of a plan, and how well they fit."""

    plan: str
    compensation: str
    maps: dict[int, GapMap]
    gaps: tuple[FittedGap, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Halt:
    """Hold the tensors of a pass that pauses at a layer.

    ``acted_on``: the map's input (M, or the input of the projection that makes it, times the layer's share),
    ``[batch * tokens, width]``; the state is ``[batch * tokens, hidden]``.
    """

    acted_on: Tensor
    state: Tensor


@dataclass(frozen=True)
class Change:
    """What is done to the state there: what the map acts on, times ``matrix``, + ``bias`` is added, both float32."""

    matrix: Tensor
    bias: Tensor | None


def fit(model: nn.Module, calibration: Calibration, plan: SkipPlan, recipe: Recipe, weigh: Weigh) -> Fitted:
    """Fit the maps of ``plan``'s gaps. The model is left as it was; it must have no plan applied.

    Raises :class:`CompensationError` when a layer before a gap cannot hold a map, with the reason.
    """
    started = time.perf_counter()
    open_gaps = gaps(plan, drift=recipe.drift)
    shares = {gap.layer: calibration.require(gap.layer) for gap in open_gaps}
    maps: dict[int, GapMap] = {}
    found: list[FittedGap] = []
    if open_gaps:
        for gap in open_gaps:
            require_holds(locate(model), gap.layer, recipe)
        applied = AppliedPlan(model, plan if recipe.source == "pruned" else SkipPlan.dense(len(plan)))
        with _Passes(model, applied, calibration.batches, open_gaps, shares, recipe.scope) as passes:
            changes: Sequence[Change | None] = [None] * len(calibration.batches)
            for gap in open_gaps:
                halts = passes.advance(changes)
                sums = gap_sums(halts, calibration.batches, gap, weigh)
                solution = solve(sums, ridge=recipe.ridge, bias=recipe.bias)
                maps[gap.layer] = gap_map(gap, solution, shares[gap.layer], recipe.scope)
                found.append(FittedGap(gap.layer, gap.end, sums.plain_share, solution.unexplained))
                change = change_of(maps[gap.layer], calibration.device) if recipe.source == "pruned" else None
                changes = [change] * len(calibration.batches)
    return Fitted(plan.text, recipe.text, maps, tuple(found), calibration.kept, time.perf_counter() - started)


def gap_sums(halts: Sequence[Halt], batches: Sequence[CalibrationBatch], gap: Gap, weigh: Weigh) -> GapSums:
    """The sums of one gap over all batches."""
    parts = []
    for halt, batch in zip(halts, batches, strict=True):
        target = batch.targets[gap.end]
        residual = target.double() - halt.state[batch.kept].double()
        parts.append(GapSums.of(halt.acted_on[batch.kept], residual, target, weigh(gap.end, batch, target)))
    return GapSums.merge(parts)


def require_holds(stack: DecoderStack, layer: int, recipe: Recipe) -> None:
    """Raise :class:`CompensationError` unless the layer can hold a map of this recipe."""
    try:
        site = fold_site(stack, layer)
        if recipe.bias:
            require_bias(site, layer)
        if recipe.scope == "projection":
            require_projection(site, layer)
    except FoldingError as error:
        raise CompensationError(str(error)) from None


def gap_map(gap: Gap, solution: Solution, share: float, scope: Scope) -> GapMap:
    """The map as it is kept, float32 on the CPU; its bias goes into the projection, before the layer's share."""
    matrix = solution.change
    if scope == "output":
        matrix = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device) + matrix
    bias = None if solution.bias is None else (solution.bias / share).float().cpu()
    return GapMap(gap.layer, gap.end, matrix.float().cpu(), bias, share, scope)


def change_of(own: GapMap, device: torch.device) -> Change:
    """What a kept map does to states on a device."""
    bias = None if own.bias is None else (own.bias * own.share).to(device)
    return Change(own.change.float().to(device), bias)


class _Passes:
    """The forward passes of all batches through the decoder under a plan, halting behind the layers before gaps."""

    def __init__(
        self,
        model: nn.Module,
        applied: AppliedPlan,
        batches: Sequence[CalibrationBatch],
        open_gaps: Sequence[Gap],
        shares: dict[int, float],
        scope: Scope,
    ) -> None:
        self._stack = locate(model)
        self._applied, self._batches, self._gaps, self._shares = applied, batches, open_gaps, shares
        self._scope: Scope = scope
        self._resources = ExitStack()
        self._calls: list[HaltingCall[Halt, Change | None]] = []
        self._halts: dict[int, Callable[[Halt], Change | None]] = {}
        self._running = 0

    def __enter__(self) -> _Passes:
        with ExitStack() as stack:
            for gap in self._gaps:
                site = fold_site(self._stack, gap.layer)
                watched = stack.enter_context(acted_on(site, self._scope, gap.layer))
                hook = lambda module, args, output, gap=gap, watched=watched: self._behind(gap, watched, output)  # noqa: E731
                handle = self._stack.layers[gap.layer].register_forward_hook(hook)
                stack.callback(handle.remove)
            stack.enter_context(self._applied)
            for number in range(len(self._batches)):
                call: HaltingCall[Halt, Change | None] = HaltingCall(self._body(number))
                self._calls.append(stack.enter_context(call))
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def advance(self, changes: Sequence[Change | None]) -> list[Halt]:
        """Let every pass go on, with its change, to where it halts next."""
        halts = []
        for number, (call, change) in enumerate(zip(self._calls, changes, strict=True)):
            self._running = number
            if self._applied.plan.needs_vision_tokens:
                self._applied.vision_mask = self._batches[number].vision
            told = call.advance(change)
            assert told is not None
            halts.append(told)
        return halts

    def _body(self, number: int) -> Callable[[Callable[[Halt], Change | None]], None]:
        batch = self._batches[number]

        def run(halt: Callable[[Halt], Change | None]) -> None:
            self._halts[number] = halt
            with torch.inference_mode():  # holds for one thread only
                self._stack.owner(*batch.args, **batch.kwargs)

        return run

    def _behind(self, gap: Gap, watched: OutputSum | ProjectionInput, output: Any) -> Any:
        """Behind a layer before a gap: show M and the state, wait for the map, and go on with it in place."""
        number = self._running
        state = output[0] if isinstance(output, tuple) else output
        rows = on_all_tokens(watched.take(), state, self._batches[number].vision) * self._shares[gap.layer]
        change = self._halts[number](Halt(rows, state.flatten(0, 1)))
        if change is None:
            return output
        changed = changed_state(state, rows, change)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def changed_state(state: Tensor, acted_on: Tensor, change: Change) -> Tensor:
    """The state ``[batch, tokens, hidden]`` with the map in place, in float32 and rounded once to its dtype."""
    moved = state.float() + (acted_on.float() @ change.matrix).view(state.shape)
    if change.bias is not None:
        moved = moved + change.bias
    return moved.to(state.dtype)


def on_all_tokens(rows: Tensor, state: Tensor, vision: Tensor) -> Tensor:
    """Rows of a layer for all tokens, ``[batch * tokens, width]``: zero for those that did not go through it."""
    if len(rows) == state.shape[0] * state.shape[1]:
        return rows
    split = TokenSplit.from_vision_mask(vision)
    assert split is not None
    text = rows.view(split.text.batch, split.text.width, -1)
    return split.text.put(text.new_zeros(*state.shape[:2], text.shape[-1]), text).flatten(0, 1)
