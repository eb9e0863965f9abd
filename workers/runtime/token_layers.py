"""The forward of a decoder layer that treats vision tokens apart: frozen or bypassed, the whole layer or a part of it.

The layer's own forward is called on gathered rows, so that norms, gates, experts and residuals need no code of ours.
Where the MLP alone is frozen, it is the MLP's own forward, and that of the modules that serve it.

Shapes: ``batch`` samples of ``tokens`` each, of which ``rows`` are gathered (the text or the vision tokens of a sample,
padded to the longest); ``hidden`` is the width of the residual stream, ``heads`` of ``size`` are those of attention.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .edits import Edits, NotCopied
from .locate import CACHE_ARGUMENTS, MASK_ARGUMENTS, argument_name, forward_parameters, shares_keys
from .plan import Action, PlanError
from .sublayers import Block, leave_out
from .text_cache import (
    CapturedKeys,
    CapturingCache,
    MergingCache,
    causal_columns,
    existing_text_only_layer,
    query_columns,
    select_columns,
    text_only_layer,
)
from .token_rows import TokenRows, TokenSplit
from .vision_tokens import VisionTokens

QUERY_PROJECTIONS = ("q_proj", "q_b_proj", "wq", "query")
TOKENS_SECOND_TO_LAST = ("position_embedding", "freqs_ci", "rotary", "per_layer_input")
TOKENS_LAST = ("position_ids", "cache_position")
UNTOUCHED = ("shared_kv_states",)


class TokenLayer(NotCopied):
    """Forward of one decoder layer in which a plan treats vision tokens apart.

    ``block`` gives its parts, for actions that leave out one of them. One thread at a time is in it: for some moments
    the layer's own modules do something else than usual.
    """

    def __init__(
        self,
        layer: nn.Module,
        layer_idx: int,
        action: Action,
        tokens: VisionTokens,
        *,
        mask_may_be_none: bool,
        block: Block | None = None,
    ) -> None:
        runs = {
            Action.FREEZE: self._freeze,
            Action.BYPASS: self._bypass,
            Action.FREEZE_ATTENTION: self._freeze_attention,
            Action.FREEZE_MLP: self._freeze_mlp,
        }
        if action not in runs:
            raise PlanError(f"layer {layer_idx}: nothing here runs {action.letter} ({action.label})")
        self._run, self._hides_vision = runs[action], action.row.hides_vision
        self._layer, self._layer_idx, self._tokens, self._block = layer, layer_idx, tokens, block
        self._alone = threading.RLock()
        self._mask_may_be_none = mask_may_be_none
        self._forward: Callable[..., Any] = layer.forward
        named = forward_parameters(layer)
        self._parameters = tuple(name for name, own in named.items() if own.kind is own.POSITIONAL_OR_KEYWORD)
        self._cache_name = argument_name(layer, CACHE_ARGUMENTS) or CACHE_ARGUMENTS[0]
        self._mask_name = argument_name(layer, MASK_ARGUMENTS) or MASK_ARGUMENTS[0]
        self._query_projections = _query_projections(layer)
        self._shares_keys = shares_keys(layer)
        self._query_scale = query_scale(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; hidden states are ``[..., batch, tokens, hidden]``, as are those returned."""
        with self._alone:
            return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        hidden_states = arguments.pop(self._parameters[0])
        cache: Cache | None = arguments.get(self._cache_name)
        split = self._tokens.split_for(
            hidden_states, lambda: self._past_tokens(cache, hidden_states.shape[-2]), last_tokens=self._shares_keys
        )
        if split is None:
            if self._hides_vision:
                self._hide_vision_columns(arguments, hidden_states.shape[-2])
            return self._forward(hidden_states, **arguments)
        return self._run(split, hidden_states, arguments)

    # Freeze -------------------------------------------------------------------------------------------------------

    def _freeze(self, split: TokenSplit, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
        """Text rows attend to everything; vision rows give keys and values only."""
        cache: Cache | None = arguments.get(self._cache_name)
        mask = self._mask_rows(split.text, arguments.get(self._mask_name))
        if mask is None:
            mask = self._causal_mask(split.text, cache)
        text = self.rows_of(split.text, arguments)
        text[self._mask_name] = mask
        if self._shares_keys:  # it takes all keys from an earlier layer
            return self._run_text(split.text, hidden_states, text, cache)
        text[self._cache_name] = MergingCache(cache, self._merging(split, hidden_states, arguments))
        return self._run_text(split.text, hidden_states, text, cache)

    def _run_text(self, rows: TokenRows, hidden_states: Tensor, text: dict[str, Any], cache: Cache | None) -> Any:
        past = self._past_tokens(cache, rows.length) if self._query_scale else 0
        with _scaled_queries(self._query_scale, rows, past):
            output = self._forward(_take_tokens(rows, hidden_states), **text)
        if isinstance(output, tuple):
            return (rows.put(hidden_states, output[0]), *output[1:])
        return rows.put(hidden_states, output)

    def _past_tokens(self, cache: Cache | None, new_tokens: int) -> int:
        """Tokens of the sequence before this call's."""
        if cache is None:
            return 0
        if self._shares_keys:  # it has no length of its own; an earlier layer has stored this call's tokens already
            return int(cache.get_seq_length()) - new_tokens
        if len(cache.layers) > self._layer_idx and not isinstance(cache.layers[self._layer_idx], CacheLayerMixin):
            attention = next(number for number, own in enumerate(cache.layers) if isinstance(own, CacheLayerMixin))
            return int(cache.get_seq_length(attention)) - (new_tokens if attention < self._layer_idx else 0)
        return int(cache.get_seq_length(self._layer_idx))

    def _merging(
        self, split: TokenSplit, hidden_states: Tensor, arguments: dict[str, Any]
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        # What makes of the text rows' keys and values, ``[batch, heads, rows, size]``, those of all rows.
        vision = split.vision
        captured = self.capture(_take_tokens(vision, hidden_states), self.rows_of(vision, arguments))
        return lambda keys, values: (
            split.merge_along_tokens(keys, captured.keys),
            split.merge_along_tokens(values, captured.values),
        )

    def capture(self, hidden_states: Tensor, arguments: dict[str, Any]) -> CapturedKeys:
        """Keys and values; the layer stops before attention and pays for no query."""
        try:
            with _without_queries(self._query_projections):
                self._forward(hidden_states, **{**arguments, self._mask_name: None, self._cache_name: CapturingCache()})
        except CapturedKeys as captured:
            return captured
        raise RuntimeError(f"decoder layer {self._layer_idx} handed no keys to the cache: it cannot be frozen")

    def _causal_mask(self, rows: TokenRows, cache: Cache | None) -> Tensor:
        """Make the mask that attention without a mask stands for, for some queries: ``[batch or 1, 1, rows, keys]``."""
        length, offset, start = rows.length, 0, 0
        if cache is not None and len(cache.layers) > self._layer_idx and not self._shares_keys:
            length, offset = cache.get_mask_sizes(rows.length, self._layer_idx)
            start = int(cache.get_seq_length(self._layer_idx))
        queries = query_columns(rows, start, rows.width, rows.index.device)
        keys = torch.arange(offset, offset + length, device=queries.device)
        return causal_columns(keys[None], queries)

    # Bypass -------------------------------------------------------------------------------------------------------

    def _bypass(self, split: TokenSplit, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
        cache: Cache | None = arguments.get(self._cache_name)
        mask = self._mask_rows(split.text, arguments.get(self._mask_name))
        text = self.rows_of(split.text, arguments)
        if cache is not None:
            entry = text_only_layer(cache, self._layer_idx)
            text[self._mask_name] = entry.mask_for(mask, split.text, split.text.width)
            entry.expect(split.text)
        else:
            text[self._mask_name] = _text_columns(mask, split.text)
        return self._run_text(split.text, hidden_states, text, cache)

    def _hide_vision_columns(self, arguments: dict[str, Any], new_tokens: int) -> None:
        """In later calls of a bypassed layer, drop the mask's columns of vision tokens: it has no keys for them."""
        cache: Cache | None = arguments.get(self._cache_name)
        entry = None if cache is None else existing_text_only_layer(cache, self._layer_idx)
        if entry is not None:
            arguments[self._mask_name] = entry.mask_for(arguments.get(self._mask_name), None, new_tokens)

    # Parts --------------------------------------------------------------------------------------------------------

    def _freeze_attention(self, split: TokenSplit, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
        """Text rows as in a frozen layer; vision rows go through the layer without attention."""
        output = self._freeze(split, hidden_states, arguments)
        vision = {**self.rows_of(split.vision, arguments), self._mask_name: None, self._cache_name: None}
        assert self._block is not None
        edits = Edits()
        try:
            leave_out(edits, self._layer, self._block, self._layer_idx, Action.SKIP_ATTENTION)
            own = self._forward(_take_tokens(split.vision, hidden_states), **vision)
        finally:
            edits.undo()
        if isinstance(output, tuple):
            return (split.vision.put(output[0], own[0]), *output[1:])
        return split.vision.put(output, own)

    def _freeze_mlp(self, split: TokenSplit, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
        """All rows go through the layer, in which the MLP, and what serves it alone, is given those of text."""
        assert self._block is not None
        edits = Edits()
        try:
            for name in self._block.modules(Action.SKIP_MLP):
                module = getattr(self._layer, name)
                edits.set_instance_attribute(module, "forward", partial(_run_some, split.text, module.forward))
            return self._forward(hidden_states, **arguments)
        finally:
            edits.undo()

    # Arguments ----------------------------------------------------------------------------------------------------

    def arguments_of(self, rows: TokenRows, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call for some of its rows; attention sees all rows still."""
        return {
            **self.rows_of(rows, arguments),
            self._mask_name: self._rows_of_mask(rows, arguments.get(self._mask_name)),
        }

    def _mask_rows(self, rows: TokenRows, mask: Any) -> Tensor | None:
        return None if mask is None and self._mask_may_be_none else self._rows_of_mask(rows, mask)

    def _rows_of_mask(self, rows: TokenRows, mask: Any) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2] != rows.length:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise RuntimeError(f"frozen and bypassed layers need a mask [batch, heads, queries, keys], got {shape}")
        return rows.take(mask, token_dim=2, batch_dim=0)

    def rows_of(self, rows: TokenRows, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call for some of its rows; the mask stays as it is."""
        skip = (self._cache_name, self._mask_name, *UNTOUCHED)
        selected = {}
        for name, value in arguments.items():
            if self._shares_keys and name in TOKENS_LAST and isinstance(value, Tensor):
                value = value[..., -rows.length :]
            selected[name] = value if name in skip else _select(name, value, rows, self._layer_idx)
        return selected


def _select(name: str, value: Any, rows: TokenRows, layer: int) -> Any:
    """Select the rows of a layer's argument, whatever is indexed by token in it."""
    if isinstance(value, (tuple, list)):
        return type(value)(_select(name, item, rows, layer) for item in value)
    if isinstance(value, dict):
        return {key: _select(name, item, rows, layer) for key, item in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if name in ("cos", "sin") or any(known in name for known in TOKENS_SECOND_TO_LAST):
        token_dim = value.dim() - 2
    elif name in TOKENS_LAST:
        token_dim = value.dim() - 1
    elif rows.length not in value.shape:
        return value
    elif value.dim() >= 2 and value.shape[1] == rows.length and value.shape[0] in (1, rows.batch):
        token_dim = 1
    else:
        raise RuntimeError(
            f"decoder layer {layer}: cannot tell which dimension of {name} {list(value.shape)} is tokens"
        )
    if token_dim < 0 or value.shape[token_dim] != rows.length:
        if token_dim >= 0 and value.shape[token_dim] == 1:
            return value  # the same for every token
        raise RuntimeError(f"decoder layer {layer}: {name} {list(value.shape)} does not have {rows.length} tokens")
    return rows.take(value, token_dim, token_dim - 1 if token_dim > 0 else None)


def _take_tokens(rows: TokenRows, hidden_states: Tensor) -> Tensor:
    dims = hidden_states.dim()
    return rows.take(hidden_states, token_dim=dims - 2, batch_dim=dims - 3)


def _run_some(rows: TokenRows, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the forward of a module that treats tokens one by one with some rows; for the others it gives zeros."""
    results = forward(*(_take(rows, each) for each in args), **{name: _take(rows, kwargs[name]) for name in kwargs})
    whole = isinstance(results, Tensor)
    first: Tensor = results if whole else results[0]
    flat = first.dim() == 2
    own = first.reshape(rows.batch, rows.width, -1) if flat else first
    nothing = own.new_zeros((1, 1, 1)).expand(rows.batch, rows.length, own.shape[-1])
    put = rows.put(nothing, own)
    put = put.flatten(0, 1) if flat else put
    return put if whole else (put, *results[1:])


def _take(rows: TokenRows, value: Any) -> Any:
    """Take the rows of what a module of a layer is given by token, ``[batch, tokens, ...]`` or flattened."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape[:2] == (rows.batch, rows.length):
        return rows.take(value, token_dim=1, batch_dim=0)
    if value.shape[0] == rows.batch * rows.length:
        return rows.take(value.reshape(rows.batch, rows.length, *value.shape[1:]), token_dim=1, batch_dim=0).flatten(
            0, 1
        )
    raise RuntimeError(f"a module of a layer is given {list(value.shape)}, not {[rows.batch, rows.length]} tokens")


def _text_columns(mask: Tensor | None, rows: TokenRows) -> Tensor | None:
    """Keep the text columns of a mask that already has text rows, for a call without a cache."""
    if mask is None:
        if rows.valid is None:
            return None  # text alone is causal in its own order
        columns = query_columns(rows, 0, rows.width, rows.index.device)
        return causal_columns(columns, columns)
    columns = query_columns(rows, 0, rows.width, mask.device)
    return select_columns(mask, columns.clamp(min=0), columns < 0)


class _NoQueries(nn.Module):
    """Stands in for a query projection whose result nobody reads: zeros of the right shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, states: Tensor) -> Tensor:
        """Zeros ``[..., width]`` for states ``[..., hidden]``."""
        return states.new_zeros((*states.shape[:-1], self._width))


def _query_projections(layer: nn.Module) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
    """Separate query projections: the module that holds each, its name there, and what stands in for it."""
    return tuple(
        (parent, name, _NoQueries(child.out_features))
        for parent in layer.modules()
        for name, child in parent.named_children()
        if name in QUERY_PROJECTIONS and isinstance(child, nn.Linear)
    )


@contextmanager
def _without_queries(projections: tuple[tuple[nn.Module, str, nn.Module], ...]) -> Iterator[None]:
    """Let query projections give zeros, past any hook on them."""
    edits = Edits()
    for parent, name, substitute in projections:
        edits.set_item(parent._modules, name, substitute)
    try:
        yield
    finally:
        edits.undo()


QueryScale = tuple[nn.Module, Callable[[Tensor], Tensor]]


def scales_queries_by_row(module: nn.Module) -> bool:
    """Whether an attention module is one whose row count :func:`query_scale` makes up for (Llama 4)."""
    return all(hasattr(module, name) for name in ("attn_temperature_tuning", "floor_scale", "attn_scale", "q_proj"))


def query_scale(layer: nn.Module) -> QueryScale | None:
    """Return the query projection of a layer that scales queries by how many rows came before them, and that scale.

    Llama 4 does so in layers without rotary positions. Its count is right for whole sequences only; gathered rows need
    the scale of their original positions.
    """
    for module in layer.modules():
        if not scales_queries_by_row(module) or not module.attn_temperature_tuning or getattr(module, "use_rope", True):
            continue
        attention: Any = module
        return attention.q_proj, partial(_temperature, float(attention.floor_scale), float(attention.attn_scale))
    return None


def _temperature(floor: float, factor: float, positions: Tensor) -> Tensor:
    return torch.log1p(torch.floor((positions + 1.0) / floor)) * factor + 1.0


@contextmanager
def _scaled_queries(scale: QueryScale | None, rows: TokenRows, past: int) -> Iterator[None]:
    """Make queries of gathered rows come out scaled by their own positions, not by their place among the rows."""
    if scale is None:
        yield
        return
    projection, of = scale
    own = of(rows.index.float() + past)
    counted = of(torch.arange(rows.width, device=own.device, dtype=own.dtype) + past)
    correction = (own / counted)[..., None]
    handle = projection.register_forward_hook(lambda module, args, queries: queries * correction.to(queries.dtype))
    try:
        yield
    finally:
        handle.remove()
