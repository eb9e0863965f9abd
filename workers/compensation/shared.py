"""Fit many plans: a map depends on nothing but the plan's beginning, so plans that begin alike share it.

The decoder's layers are called one at a time on the calibration batches, with the arguments that the decoder itself
hands to them. States are kept at the beginnings of plans within a budget; a new plan pays for the layers behind the
longest beginning that is known. The maps are those of :func:`workers.compensation.fit.fit`, bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workers.device.memory import memory_bytes
from workers.layerwise.decoder import Decoder, NotExactError, Recording
from workers.lru import LruCache
from workers.messages import GapShare
from workers.runtime.folding import GapMap, acted_on, fold_site
from workers.runtime.gaps import Gap, Part, gaps, holder
from workers.runtime.plan import PART_LETTERS, REMOVING_LETTERS, Action, SkipPlan
from workers.runtime.token_rows import TokenSplit

from .calibration import Calibration
from .fit import (
    Fitted,
    GapStates,
    change_of,
    changed_state,
    fit_gap,
    on_all_tokens,
    require_holds,
    require_source,
)
from .recipe import Recipe
from .weighting import weigher

LEAST_STATES_BUDGET = 1 << 30
STATES_SHARE = 8
"""Bytes of calibration states that are kept at the beginnings of plans: this part of the device's memory, at least."""
MAPS_BUDGET = 4 << 30
"""Bytes of maps that are kept. All plans of one request are walked together, so theirs should fit."""


RUN = Action.RUN.letter
GAP_LETTERS = REMOVING_LETTERS + PART_LETTERS
"""Of the actions that leave a gap."""


@dataclass(frozen=True)
class _Executed:
    """All batches' states behind a layer that was just run, ``[batch, tokens, hidden]`` each, and what maps act on."""

    prefix: str
    hidden: tuple[Tensor, ...]
    acted_on: tuple[Tensor, ...]


@dataclass(frozen=True)
class _FittedMap:
    own: GapMap
    quality: GapShare
    change: Tensor
    """What the map does to states, where these lie."""

    @property
    def nbytes(self) -> int:
        return self.own.matrix.nbytes + self.change.nbytes


class SharedFits:
    """Fits of one recipe, from the bottom up, for plans that come one after another.

    Raises:
        NotExactError: the family's layers cannot be called one at a time, or more than they change the states.
    """

    def __init__(
        self, decoder: Decoder, calibration: Calibration, recipe: Recipe, *, budget: int | None = None
    ) -> None:
        if any(batch.between for batch in calibration.batches):
            raise NotExactError("its decoder adds to the states between layers")
        self._decoder, self._calibration, self.recipe = decoder, calibration, recipe
        self._weigh = weigher(recipe.weighting, calibration)
        self._states: LruCache[str, tuple[Tensor, ...]] = LruCache(
            budget or max(LEAST_STATES_BUDGET, memory_bytes(calibration.device) // STATES_SHARE),
            lambda states: sum(state.nbytes for state in states),
        )
        self._last: _Executed | None = None
        self._maps: LruCache[str, _FittedMap] = LruCache(MAPS_BUDGET, lambda fitted: fitted.nbytes)
        self.layer_executions = 0
        """Decoder layers run so far, each over all calibration tokens."""
        owner: Any = decoder.stack.owner
        with torch.inference_mode():
            self._recordings: tuple[Recording, ...] = tuple(
                decoder.record(partial(owner, *batch.args, **batch.kwargs), run=number == 0)
                for number, batch in enumerate(calibration.batches)
            )
        self._splits = tuple(TokenSplit.from_vision_mask(batch.vision) for batch in calibration.batches)

    def fit(self, plan: SkipPlan) -> Fitted:
        """Return the maps of a plan. Raises :class:`CompensationError` when a layer before a gap cannot hold one."""
        started = time.perf_counter()
        require_source(plan, self.recipe)
        found = [self._map(plan.text[: gap.end + 1]) for gap in gaps(plan, drift=self.recipe.drift)]
        return Fitted(
            plan=plan.text,
            compensation=self.recipe.text,
            maps={each.own.layer: each.own for each in found},
            gaps=tuple(each.quality for each in found),
            tokens=self._calibration.kept,
            seconds=time.perf_counter() - started,
        )

    def change(self, prefix: str) -> Tensor:
        """Return the change of the map of the gap that ends the beginning ``prefix``, ``[hidden or width, hidden]``."""
        return self._map(prefix).change

    def share(self, layer: int, part: Part) -> float:
        """Return the factor with which what a part of a layer adds enters the stream."""
        return self._calibration.require(layer, part)

    def _map(self, prefix: str) -> _FittedMap:
        known = self._maps.get(prefix)
        if known is not None:
            return known
        layer = len(prefix.rstrip(REMOVING_LETTERS)) - 1
        gap = Gap(layer, len(prefix) - 1, holder(Action.of(prefix[layer])))
        self.share(layer, gap.part)
        require_holds(self._decoder.stack, gap, self.recipe)
        with torch.inference_mode():
            before = self._executed(prefix[: layer + 1] if self.recipe.source == "pruned" else RUN * (layer + 1))
            states = [GapStates(m, x.flatten(0, 1)) for m, x in zip(before.acted_on, before.hidden, strict=True)]
            own, quality = fit_gap(states, self._calibration, gap, self.recipe, self._weigh)
        return self._maps.put(prefix, _FittedMap(own, quality, change_of(own, self._calibration.device)))

    # States -----------------------------------------------------------------------------------------------------------

    def _entering(self, prefix: str) -> tuple[Tensor, ...]:
        """Return the states that the layer behind ``prefix`` is given."""
        executed = prefix.rstrip(REMOVING_LETTERS)
        if not executed:  # layers skipped at the very bottom stay plain skips
            return tuple(recording.hidden for recording in self._recordings)
        known = self._states.get(prefix)
        if known is not None:
            return known
        gap_below = any(letter in GAP_LETTERS for letter in executed.lstrip(REMOVING_LETTERS)[:-1])
        if executed == prefix and prefix[-1] not in GAP_LETTERS and not (self.recipe.drift and gap_below):
            states = tuple(hidden for hidden, _ in self._run(prefix, watching=False))
        else:
            before, change = self._executed(executed), self.change(prefix)
            states = tuple(changed_state(x, m, change) for x, m in zip(before.hidden, before.acted_on, strict=True))
        return self._states.put(prefix, states)

    def _executed(self, prefix: str) -> _Executed:
        """Run the layer that ends ``prefix``. The last result is kept, for its map and mapped states.

        Only mapped states are kept for longer, since what maps act on can be several times as wide.
        """
        if self._last is None or self._last.prefix != prefix:
            hidden, acted_on = zip(*self._run(prefix, watching=True), strict=True)
            self._last = _Executed(prefix, hidden, acted_on)
        return self._last

    def _run(self, prefix: str, *, watching: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the layer that ends ``prefix``, batch by batch: the states, and where asked for what maps act on."""
        layer, action = len(prefix) - 1, Action.of(prefix[-1])
        entering = self._entering(prefix[:-1])
        self.layer_executions += 1
        part = holder(action)
        site = fold_site(self._decoder.stack, layer, part) if watching else None
        share = self.share(layer, part) if watching else 1.0
        rows = zip(entering, self._recordings, self._splits, self._calibration.batches, strict=True)
        for state, recording, split, batch in rows:
            gathered = None if action is Action.RUN else split
            arguments = recording.layers[layer]
            with nullcontext() if site is None else acted_on(site, self.recipe.scope, layer) as watched:
                output = self._decoder.run_rows(layer, action, gathered, state, arguments).hidden
                found = output
                if watched is not None:
                    found = on_all_tokens(watched.take_runs(), output, batch.vision) * share
            yield output, found
