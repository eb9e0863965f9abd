"""Entries of a KV cache that report the length of the whole sequence, whatever part of it they store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class LengthLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with the length and the geometry of the one that it replaced; subclasses store what they need.

    Raises RuntimeError for a kind of cache layer whose geometry is not known.
    """

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self.window: int | None = None
        self.static_length: int | None = None
        self.record_past = getattr(replaced, "record_past", False)
        if isinstance(replaced, DynamicSlidingWindowLayer):
            self.window = int(replaced.sliding_window)
        elif isinstance(replaced, StaticSlidingWindowLayer):
            self.window = self.static_length = int(replaced.max_cache_len)
        elif isinstance(replaced, StaticLayer):
            self.static_length = int(replaced.max_cache_len)
        elif type(replaced) is not DynamicLayer:
            raise RuntimeError(f"a plan's layer cannot take the place of a {type(replaced).__name__} in the KV cache")
        self.is_sliding = self.window is not None
        self.length = int(replaced.get_seq_length())

    def get_seq_length(self) -> int:
        """Tokens of the whole sequence so far, those without keys here included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that masks are made for, as the replaced layer would give them."""
        if self.window is None:
            return (self.length + query_length if self.static_length is None else self.static_length), 0
        offset = max(self.length - self.window + 1, 0)
        if self.length >= self.window:
            return self.window - 1 + query_length, offset
        if self.static_length is not None and self.length + query_length <= self.window:
            return self.window, offset
        return self.length + query_length, offset

    @property
    def is_compileable(self) -> bool:
        """Whether masks must be made as for a static cache (this layer itself grows)."""
        return self.static_length is not None

    def get_max_length(self) -> int:
        """Return the most tokens the replaced layer could hold, -1 for no limit."""
        if self.window is not None:
            return self.window
        return -1 if self.static_length is None else self.static_length

    def activate_past_recording(self) -> None:
        """Keep tokens outside the window, so that :meth:`crop` can go back."""
        self.record_past = True


class KeylessLayer(LengthLayer):
    """The place of a layer without attention: no keys, no values, the length alone.

    ``layers`` are those of the cache.
    """

    def __init__(self, replaced: Any, layers: Sequence[Any]) -> None:
        super().__init__(replaced)
        self._layers = layers

    def prefetch(self) -> None:
        """Bring keys and values of the next layer back that are put aside: an offloaded cache asks one layer ahead."""
        own = next(number for number, layer in enumerate(self._layers) if layer is self)
        for layer in (*self._layers[own + 1 :], *self._layers[:own]):
            if isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.keys.device != layer.device:
                layer.prefetch()
                return

    def advance(self, tokens: int) -> None:
        """Count the tokens of a call."""
        self.length += tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys: raises RuntimeError."""
        raise RuntimeError("a layer without attention was given keys: another plan has filled this KV cache")

    def reset(self) -> None:
        """Go back to the beginning of the sequence."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of the sequence."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: all samples are equally long."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing: all samples are equally long."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Do nothing: all samples are equally long."""


def cache_entry(cache: Cache, layer_idx: int) -> Any:
    """Return a cache's entry of a layer, made on first use."""
    while len(cache.layers) <= layer_idx:
        if cache.layer_class_to_replicate is None:
            raise RuntimeError(f"the cache has {len(cache.layers)} layers, the decoder needs layer {layer_idx}")
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx]


def keyless_layer(cache: Cache, layer_idx: int) -> KeylessLayer:
    """Return the cache's entry of a layer without attention, put in place of the ordinary one on first use."""
    entry = cache_entry(cache, layer_idx)
    if not isinstance(entry, KeylessLayer):
        entry = cache.layers[layer_idx] = KeylessLayer(entry, cache.layers)
    return entry
