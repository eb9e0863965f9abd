"""The model under a plan as a drafter: a copy that shares the live model's weights, and its own KV cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.generation import logits_process

from .applied import apply_permanently
from .cache_rollback import Rollback
from .folding import Maps
from .plan import PlanError, SkipPlan

CACHE_NAMES = ("cache", "past_key_values")
"""What a model's forward calls the KV cache: the first since transformers 5.24."""
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
        if action.row.vision_only:
            raise PlanError(
                f"layer {layer}: a drafter generates text, where {action.letter} ({action.label}) saves nothing; "
                "speculate() takes plans of R and S"
            )
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


def cache_name(model: nn.Module) -> str:
    """Return the name by which the model's inputs carry the KV cache."""
    parameters = inspect.signature(model.prepare_inputs_for_generation).parameters  # type: ignore[arg-type]
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


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
    """One request's drafts: the drafter's cache, and how much of the sequence is in it."""

    def __init__(self, drafter: Any, processors: LogitsProcessorList, *, sample: bool) -> None:
        self._drafter, self._sample = drafter, sample
        self._processors = without_memory(processors)
        self._cache_name = cache_name(drafter)
        self._cache: DynamicCache | None = None
        self._rollback: Rollback | None = None
        self._stored = 0
        """Columns of the sequence whose keys are in the cache."""

    @property
    def started(self) -> bool:
        """Whether the prompt is in the drafter's cache."""
        return self._cache is not None

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in the drafter's cache."""
        layers = () if self._cache is None else self._cache.layers
        return sum(
            value.numel() * value.element_size()
            for layer in layers
            for value in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(value, Tensor)
        )

    def start(self, prompt: Tensor, settings: Any, inputs: dict[str, Any], longest: int) -> None:
        """Run the prompt ``[batch, tokens]`` with the ``inputs`` of the dense model's own prefill."""
        cache = DynamicCache(config=self._drafter.config.get_text_config(decoder=True))
        own = {**inputs, self._cache_name: cache}
        self._drafter._prefill(prompt, settings, own)
        self._rollback = Rollback(cache, longest)
        self._cache, self._stored = cache, prompt.shape[1]

    def draft(
        self, sequence: Tensor, length: int, inputs: Callable[[int], dict[str, Any]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Draft ``length`` tokens behind ``sequence`` ``[batch, tokens]``.

        ``inputs(n)`` are the model inputs, without cache, of the sequence and n more tokens. Returns the tokens
        ``[batch, length]`` and, under sampling, the distribution ``[batch, vocabulary]`` that each was drawn from.
        """
        distributions: list[Tensor] = []
        for drafted in range(length):
            outputs = self._step(sequence, inputs(drafted))
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=sequence.device)
            scores = self._processors(sequence, logits)
            if self._sample:
                distributions.append(scores.softmax(dim=-1))
                tokens = torch.multinomial(distributions[-1], num_samples=1)
            else:
                tokens = scores.argmax(dim=-1, keepdim=True)
            sequence = torch.cat([sequence, tokens], dim=-1)
        return sequence[:, sequence.shape[1] - length :], distributions

    def _step(self, sequence: Tensor, inputs: dict[str, Any]) -> Any:
        """Run what is not in the cache yet, and put it there."""
        assert self._rollback is not None
        new = sequence.shape[1] - self._stored
        prepared = self._drafter.prepare_inputs_for_generation(
            sequence, next_sequence_length=new, **{**inputs, self._cache_name: self._cache}
        )
        self._rollback.before_pass()
        outputs = self._drafter(**prepared, return_dict=True)
        self._rollback.after_pass()
        self._stored = sequence.shape[1]
        return outputs

    def keep(self, columns: int) -> None:
        """Forget what is stored behind the first ``columns`` columns of the sequence."""
        if self._rollback is not None:
            surplus = max(self._stored - columns, 0)
            self._rollback.remove(surplus)
            self._stored -= surplus
