"""KV cache pieces for frozen and bypassed layers.

A bypassed layer stores keys and values of text only, yet must report the full length: transformers reads the length
of the whole cache, and with it positions and mask sizes, from one of its layers.

Shapes: ``batch`` samples, ``rows`` of a call that are given to the layer (text tokens, padding included), ``stored``
tokens kept per sample, ``heads`` of keys and values of ``size`` each. A ``1`` for the batch broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .cache_lengths import LengthLayer, cache_entry
from .token_rows import TokenRows


class TextOnlyLayer(LengthLayer):
    """A cache layer that stores text tokens only and reports the length of the whole sequence.

    ``columns``, ``[batch or 1, stored]``, gives the original position of the first stored tokens, -1 for padding of
    samples with fewer text tokens. Tokens stored after them (generated ones) are the last of the sequence in order.
    """

    def __init__(self, replaced: Any) -> None:
        super().__init__(replaced)
        self.columns: Tensor | None = None
        self._incoming: TokenRows | None = None
        self._padded = False
        """Whether padding is stored: samples had different numbers of text tokens, or none at all."""
        if self.length:
            self._take_over(replaced)

    def _take_over(self, replaced: Any) -> None:
        """Start from what the replaced layer stored in earlier, text-only calls."""
        stored = self.length if self.window is None else min(self.length, self.window - 1)
        end = replaced.keys.shape[-2] if self.static_length is None else min(self.length, self.static_length)
        self.keys = replaced.keys[..., end - stored : end, :]
        self.values = replaced.values[..., end - stored : end, :]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.columns = torch.arange(self.length - stored, self.length, device=self.device)[None]

    # Storing ------------------------------------------------------------------------------------------------------

    def expect(self, rows: TokenRows) -> None:
        """Announce that the next :meth:`update` brings these rows of a prompt."""
        self._incoming = rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``[batch, heads, rows, size]``; gives all that are stored and new."""
        new = key_states.shape[-2]
        if self._incoming is not None:
            past = self._all_columns(self.stored)
            self.columns = _join(past, query_columns(self._incoming, self.length, new, key_states.device))
            self.length += self._incoming.length
            self._padded = self._padded or self._incoming.valid is not None
            self._incoming = None
        else:
            self.length += new
        keys, values = super().update(key_states, value_states)
        if self.window is not None and not self.record_past:
            self._drop_outside_window()
        return keys, values

    def _all_columns(self, stored: int) -> Tensor | None:
        """Original positions of everything stored, ``[batch or 1, stored]``; ``None`` when nothing is."""
        if stored == 0:
            return None
        known = 0 if self.columns is None else self.columns.shape[1]
        tail = torch.arange(self.length - (stored - known), self.length, device=self.keys.device)[None]
        return tail if self.columns is None else _join(self.columns, tail)

    def _drop_outside_window(self) -> None:
        """Forget the first tokens stored where no later query of any sample can see them."""
        assert self.window is not None
        surplus = self.stored - self.window + 1
        columns = self._all_columns(self.stored)
        if columns is None or surplus <= 0:
            return
        if self._padded:
            # A sample with padding has fewer tokens stored: some of its first ones may still be in the window.
            # Looking costs a synchronisation with the device, so it is done once in a while.
            if surplus < self.window:
                return
            outside = (columns <= self.length - self.window).all(0)
            surplus = min(surplus, int(outside.cumprod(0).sum()))
        self.keys, self.values = self.keys[..., surplus:, :], self.values[..., surplus:, :]
        self.columns = columns[:, surplus:]

    def mask_for(self, mask: Tensor | None, query_rows: TokenRows | None, new_tokens: int) -> Tensor | None:
        """Return the mask for the stored keys and those of the next :meth:`update`; call it before that.

        ``mask``, ``[batch or 1, heads or 1, queries, keys]``, already has the queries of this call as rows, and the
        whole sequence as columns. ``query_rows`` are the rows of a prompt with vision tokens, else the queries are
        ``new_tokens`` in a row. Without a mask (causal), one is made only where a key must be hidden.
        """
        nothing_hidden = not self._padded and (query_rows is None or query_rows.valid is None)
        if mask is None and nothing_hidden and (new_tokens == 1 or self.stored == 0):
            return None
        device = mask.device if mask is not None else self._device_of(query_rows)
        past = self._all_columns(self.stored)
        new = query_columns(query_rows, self.length, new_tokens, device)
        columns = new if past is None else _join(past.to(device), new)
        if mask is None:
            return causal_columns(columns, new)
        full_length = new_tokens if query_rows is None else query_rows.length
        _, offset = self.get_mask_sizes(full_length)
        position = columns - offset
        hidden = (columns < 0) | (position < 0) | (position >= mask.shape[-1])
        return select_columns(mask, position.clamp(0, mask.shape[-1] - 1), hidden)

    @property
    def stored(self) -> int:
        """Tokens stored per sample, padding included."""
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None else 0

    def _device_of(self, rows: TokenRows | None) -> torch.device:
        return self.keys.device if rows is None else rows.index.device

    # What generation does to a cache ------------------------------------------------------------------------------

    def reset(self) -> None:
        super().reset()
        self.length, self.columns, self._incoming, self._padded = 0, None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of the sequence, vision tokens counted."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        columns = self._all_columns(self.stored)
        self.length += tokens_to_remove
        if columns is None:
            return
        remaining = ((columns >= 0) & (columns < self.length)).any(0).nonzero()
        keep = int(remaining.max()) + 1 if len(remaining) else 0
        self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]
        columns = columns[:, :keep]
        self.columns = columns.masked_fill(columns >= self.length, -1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self._map_batch(lambda tensor: tensor[indices, ...])

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized or self.keys is None:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self.columns is not None and self.columns.shape[0] > 1:
            self.columns = change(self.columns)


def query_columns(rows: TokenRows | None, start: int, new_tokens: int, device: torch.device) -> Tensor:
    """Original positions of a call's queries, ``[batch or 1, queries]``, -1 for padding.

    ``start`` is the length of the sequence before the call, ``rows`` a prompt's rows, ``None`` for plain new tokens.
    """
    if rows is None:
        return torch.arange(start, start + new_tokens, device=device)[None]
    columns = rows.index + start
    if rows.valid is not None:
        columns = columns.masked_fill(~rows.valid, -1)
    return (columns[:1] if rows.shared is not None else columns).to(device)


def causal_columns(columns: Tensor, queries: Tensor) -> Tensor:
    """Return a boolean mask ``[batch or 1, 1, queries, keys]`` from original positions, -1 for padding.

    Padding keys are hidden; padding queries see all keys, so that no row is empty: what they compute is never used.
    """
    unbounded = queries.masked_fill(queries < 0, torch.iinfo(queries.dtype).max)
    return (columns[:, None, None, :] >= 0) & (columns[:, None, None, :] <= unbounded[:, None, :, None])


def _join(first: Tensor | None, second: Tensor) -> Tensor:
    """Columns ``[batch or 1, n]`` one after the other."""
    if first is None:
        return second
    batch = max(first.shape[0], second.shape[0])
    return torch.cat([first.expand(batch, -1), second.expand(batch, -1)], dim=1)


def select_columns(mask: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    """Columns ``position`` (``[batch or 1, keys]``) of a 4-D mask, those marked ``hidden`` masked out.

    A boolean mask says what may be seen, a floating one is added to the scores.
    """
    if position.shape[0] == 1:
        selected = mask.index_select(-1, position[0].to(mask.device))
    else:
        batch = position.shape[0]
        wide = mask.expand(batch, *mask.shape[1:])
        selected = torch.take_along_dim(wide, position[:, None, None, :].to(mask.device), dim=-1)
    hidden = hidden[:, None, None, :].to(mask.device)
    if mask.dtype == torch.bool:
        return selected & ~hidden
    return selected.masked_fill(hidden, torch.finfo(mask.dtype).min)


def existing_text_only_layer(cache: Cache, layer_idx: int) -> TextOnlyLayer | None:
    """Return the cache's text-only entry of a layer, if it has one."""
    entry = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    return entry if isinstance(entry, TextOnlyLayer) else None


def text_only_layer(cache: Cache, layer_idx: int) -> TextOnlyLayer:
    """Return the cache's text-only entry of a layer, put in place of the ordinary one on first use."""
    entry = cache_entry(cache, layer_idx)
    if not isinstance(entry, TextOnlyLayer):
        entry = cache.layers[layer_idx] = TextOnlyLayer(entry)
    return entry


class CapturedKeys(Exception):  # noqa: N818  (not an error: it ends a forward pass on purpose)
    """Carries the keys and values out of a layer's forward before its attention starts."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class CapturingCache(DynamicCache):  # type: ignore[misc]
    """Stands in for the cache to take a layer's keys and values and end its forward."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise :class:`CapturedKeys` with ``[batch, heads, rows, size]`` keys and values."""
        raise CapturedKeys(key_states, value_states)


class MergingCache(DynamicCache):  # type: ignore[misc]
    """Stands in for the cache: adds the vision rows' keys and values to those of text before they are stored."""

    def __init__(self, real: Cache | None, merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._real, self._merge = real, merge
        if real is not None:
            self.layers = real.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Merge, then store in the real cache if there is one; gives what attention must see."""
        keys, values = self._merge(key_states, value_states)
        if self._real is None:
            return keys, values
        updated: tuple[Tensor, Tensor] = self._real.update(keys, values, layer_idx, *args, **kwargs)
        return updated
