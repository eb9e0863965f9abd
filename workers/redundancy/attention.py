"""Measure the attention that text pays to vision tokens; one layer's attention maps exist at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.layerwise.hooks import Hooks
from workers.messages import KindSums
from workers.runtime.edits import Edits
from workers.runtime.locate import DecoderStack

from .batches import Batch
from .collectors import array
from .sums import ratio_sums, sample_sums


class VisionAttention:
    """Mean over heads and text queries of the attention mass on vision tokens, and from the last token alone."""

    def __init__(self, layers: int) -> None:
        self._sums = ratio_sums(2, layers)
        self._seen: set[int] = set()
        self._layers = layers

    @contextmanager
    def listening(self, stack: DecoderStack, batch: Batch) -> Iterator[None]:
        """Have the decoder make attention weights (the family's own eager attention) and add up each layer's."""
        edits = Edits()
        for config in stack.configs:
            edits.set_instance_attribute(config, "_attn_implementation_internal", "eager")
        try:
            with Hooks() as hooks:
                for number, layer in enumerate(stack.layers):
                    for module in _attention_modules(layer):
                        hooks.after(module, partial(self._add, number, batch=batch))
                yield
        finally:
            edits.undo()

    def _add(self, layer: int, output: Any, batch: Batch) -> None:
        weights = _weights_of(output, batch)
        if weights is None:
            return
        self._seen.add(layer)
        vision = batch.groups["vision"].to(weights.dtype)
        weights = weights.to(vision.device)  # the layer's device may be another one than the states'
        mass = torch.einsum("bhqk,bk->bq", weights, vision).double() / weights.shape[1]
        for row, group in enumerate(("text", "last")):
            queries = batch.groups[group]
            # A sample without vision tokens has no attention to measure.
            counts = queries.sum(1) * batch.groups["vision"].any(1)
            self._sums[:, row, layer] += sample_sums(array((mass * queries).sum(1)), array(counts))

    def sums(self) -> KindSums:
        """Return the sums, and which layers gave no weights."""
        missing = [layer for layer in range(self._layers) if layer not in self._seen]
        return KindSums({"attention": self._sums}, refused={str(layer): "it has no attention map" for layer in missing})


def _attention_modules(layer: nn.Module) -> list[nn.Module]:
    """Direct parts of a decoder layer that are attention by their name."""
    return [module for name, module in layer.named_children() if "attn" in name.lower() or "attention" in name.lower()]


def _weights_of(output: Any, batch: Batch) -> Tensor | None:
    """Return the attention weights ``[batch, heads, queries, keys]`` in a module's output, if of the prompt's size."""
    shape = (batch.size, batch.tokens, batch.tokens)
    for item in output if isinstance(output, tuple) else ():
        if isinstance(item, Tensor) and item.dim() == 4 and (item.shape[0], *item.shape[2:]) == shape:
            return item
    return None
