"""Setting a KV cache back to an earlier length, so that tokens of a draft that were refused leave no trace in it."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .descriptor import UnsupportedFamilyError

CROPPED_IN_EVERY_RELEASE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, StaticLayer)
"""Later releases say so themselves (``is_croppable``)."""


class Rollback:
    """Sets one cache back. ``longest`` is the most tokens that the cache will hold.

    Raises :class:`UnsupportedFamilyError` naming the first layer that cannot be set back.
    """

    def __init__(self, cache: Any, longest: int) -> None:
        if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
            raise UnsupportedFamilyError(
                f"a {type(cache).__name__} cannot be set back after a draft: drafting needs a cache of attention layers"
            )
        for index, layer in enumerate(cache.layers):
            if not _can_be_set_back(layer, longest):
                raise UnsupportedFamilyError(
                    f"layer {index} keeps its state in a {type(layer).__name__}, which cannot be set back after a "
                    "draft: drafting needs layers of attention over a KV cache"
                )
        self._cache = cache
        self._lengths: list[int] = []
        self._growing: list[int] | None = None
        """Layers that hold one entry a token; those of cross-attention hold an image's, and are left alone."""
        cache.activate_past_recording()

    def before_pass(self) -> None:
        """Take note of the layers' lengths before the first pass, to learn which of them grow."""
        if self._growing is None:
            self._lengths = [_length(layer) for layer in self._cache.layers]

    def after_pass(self) -> None:
        """Learn which layers have grown in the first pass."""
        if self._growing is None:
            layers = self._cache.layers
            before = self._lengths + [0] * (len(layers) - len(self._lengths))
            self._growing = [
                index
                for index, (layer, length) in enumerate(zip(layers, before, strict=True))
                if isinstance(layer, LinearAttentionLayer) or _length(layer) > length
            ]

    def remove(self, tokens: int) -> None:
        """Remove the last ``tokens`` tokens; even with 0, windows drop what they have put aside for this."""
        for index in self._growing or ():
            layer = self._cache.layers[index]
            if hasattr(layer, "crop"):
                layer.crop(-tokens)
            else:  # a static layer, before transformers 5.20
                layer.cumulative_length.sub_(tokens)
                if isinstance(layer, StaticSlidingWindowLayer):
                    layer.cumulative_length_int -= tokens

    def end(self) -> None:
        """Have sliding windows store no more than their window again."""
        for layer in self._cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False


def _can_be_set_back(layer: Any, longest: int) -> bool:
    if isinstance(layer, StaticSlidingWindowLayer):
        return bool(longest <= layer.max_cache_len)
    if isinstance(layer, QuantizedLayer):
        return False
    return type(layer) in CROPPED_IN_EVERY_RELEASE or bool(getattr(layer, "is_croppable", False))


def _length(layer: Any) -> int:
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0
