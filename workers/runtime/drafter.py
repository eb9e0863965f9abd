"""The model under a plan as a drafter: a copy that shares the live model's weights, and drafts on its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation import logits_process

from .applied import apply_permanently
from .folding import Maps
from .plan import Action, PlanError, SkipPlan

STATEFUL = (
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
)
"""Processors of transformers that remember earlier calls, or call what may."""


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the module tree and its configurations; every parameter and buffer stays the original's own."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def drafting_model(model: nn.Module, plan: SkipPlan, maps: Maps | None) -> nn.Module:
    """Return the model under the plan, sharing all weights but those that hold a map.

    Raises :class:`PlanError` when the model cannot take the plan for good, or the plan has layers that treat vision
    tokens apart.
    """
    for layer, action in enumerate(plan):
        if action is not Action.RUN and not action.row.removes_layer:
            own = f"{action.letter} ({action.label})"
            reason = f"a drafter generates text, where {own} saves nothing" if action.row.vision_only else f"not {own}"
            raise PlanError(f"layer {layer}: {reason}; speculate() takes plans of R and S")
    drafter = sharing_copy(model)
    apply_permanently(drafter, plan, maps)
    return drafter


def bytes_beside(model: nn.Module, drafter: nn.Module) -> int:
    """Count the bytes of the drafter's tensors that are not the model's."""
    own = {tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in chain(drafter.parameters(), drafter.buffers())
        if tensor.data_ptr() not in own
    )


def without_memory(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return the processors that may be called for tokens that are then refused.

    Others see the tokens that are generated, in order, and nothing else; drafts are then made without them.
    """
    return LogitsProcessorList(
        each
        for each in processors
        if type(each).__module__ == logits_process.__name__ and not isinstance(each, STATEFUL)
    )


class Drafting:
    """Drafts tokens for one request, on the dense model's own cache.

    Each draft begins from copies of the cache's entries of the kept layers (as in 2309.08168): the drafter needs no
    prefill, sees the dense model's keys of prompt, images and answer, and leaves the cache as it was.
    """

    def __init__(self, drafter: Any, kept: Sequence[int], processors: LogitsProcessorList, *, sample: bool) -> None:
        self._drafter, self._kept, self._sample = drafter, tuple(kept), sample
        self._processors = without_memory(processors)
        self._ends: Tensor | None = None
        self._go_on: Callable[[Sequence[float]], bool] | None = None
        self.cache_bytes = 0
        """Most bytes of keys and values that a draft held."""

    def watch(self, ends: Tensor | None, go_on: Callable[[Sequence[float]], bool]) -> None:
        """Look at each drafted token, and end a draft early.

        That is where every row has drafted one of ``ends``, and where ``go_on`` says so of the confidences: per
        position the largest probability of the drafter's distribution, of the row that is least sure.
        """
        self._ends, self._go_on = ends, go_on

    def decoding(self) -> AbstractContextManager[None]:
        """Have the drafter's experts computed as transformers computes a model's while it decodes."""
        context: AbstractContextManager[None] = self._drafter._optimize_model_for_decode()
        return context

    def draft(
        self, sequence: Tensor, length: int, cache: Cache, inputs: Callable[[int], dict[str, Any]]
    ) -> tuple[Tensor, list[Tensor], list[float]]:
        """Draft at most ``length`` tokens behind ``sequence`` ``[batch, tokens]``, whose last is not in ``cache`` yet.

        ``inputs(n)`` are the model inputs of the sequence and n more tokens. Returns the tokens ``[batch, drafted]``;
        under sampling, the distribution ``[batch, vocabulary]`` that each was drawn from; and where it is watched, its
        confidence.
        """
        own = draft_cache(cache, self._kept)
        distributions: list[Tensor] = []
        confidences: list[float] = []
        start = sequence.shape[1]
        going = sequence.new_ones(len(sequence), dtype=torch.bool)
        for drafted in range(length):
            prepared = self._drafter.prepare_inputs_for_generation(
                sequence, next_sequence_length=1, **_with_cache(inputs(drafted), cache, own)
            )
            outputs = self._drafter(**prepared, return_dict=True)
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=sequence.device)
            scores = self._processors(sequence, logits)
            if self._sample:
                distributions.append(scores.softmax(dim=-1))
                tokens = torch.multinomial(distributions[-1], num_samples=1)
            else:
                tokens = scores.argmax(dim=-1, keepdim=True)
            sequence = torch.cat([sequence, tokens], dim=-1)
            if self._go_on is None:
                continue
            highest = scores.amax(dim=-1) - scores.logsumexp(dim=-1)
            confidences.append(float(highest.masked_fill(~going, 0.0).min().exp()))
            if self._ends is not None:
                going &= ~torch.isin(tokens[:, 0], self._ends)
            if not going.any() or not self._go_on(confidences):
                break
        self.cache_bytes = max(self.cache_bytes, _bytes_of(own))
        return sequence[:, start:], distributions, confidences


def draft_cache(cache: Cache, kept: Sequence[int]) -> Cache:
    """Return a cache of the kept layers that begins as ``cache`` and may be written to without changing it."""
    own = copy.copy(cache)
    own.layers = [_branch(cache.layers[index]) for index in kept if index < len(cache.layers)]
    return own


def _branch(layer: Any) -> Any:
    """Copy a cache layer so that it can go on alone; keys and values are shared as long as nothing is written."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer):
        branch = copy.copy(layer)  # an update puts new tensors in the place of the old ones
    elif type(layer) in (StaticLayer, StaticSlidingWindowLayer):
        # Drafts are written behind the length, where the verification writes anew.
        branch = copy.copy(layer)
        branch.cumulative_length = layer.cumulative_length.clone()
    else:
        branch = copy.deepcopy(layer)
    if hasattr(branch, "record_past"):
        branch.record_past = False
    return branch


def _with_cache(inputs: dict[str, Any], cache: Cache, own: Cache) -> dict[str, Any]:
    return {name: own if value is cache else value for name, value in inputs.items()}


def _bytes_of(cache: Cache) -> int:
    """Bytes of keys and values."""
    return sum(
        value.numel() * value.element_size()
        for layer in cache.layers
        for value in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(value, Tensor)
    )
