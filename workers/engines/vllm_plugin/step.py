"""Know of the step that vLLM runs which rows are vision tokens, and arrange its attention for split layers.

vLLM's runners embed the tokens of every step by the model's ``embed_input_ids``, with a mask of the rows that images
fill: whole prompts, chunks and what a cached prefix leaves alike. Rows of text that only look like placeholders are
not among them, and neither are generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .rows import Queries, Rows, VisionSlots, slots_of, text_only, text_runs

CPU_ATTENTION = "CPU_ATTN"
"""The attention backend whose metadata is known to describe any sequences; others attend with all rows as queries."""


class Step:
    """The running step of one model, for all of its split layers."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        """``None`` when the step holds no vision token."""
        self._noted: Tensor | None = None
        self._frozen: list[str] = []
        self._bypassed: list[str] = []
        self._slots: dict[int, VisionSlots] = {}

    # While the model is built -------------------------------------------------------------------------------------

    def freeze(self, attention: Any) -> bool:
        """Take a frozen layer's attention in; give whether text rows alone may be its queries."""
        if attention.attn_backend.get_name() != CPU_ATTENTION:
            return False
        attention.attn_backend = _remembering(attention.attn_backend)
        self._frozen.append(attention.layer_name)
        return True

    def bypass(self, attention: Any) -> None:
        """Take a bypassed layer's attention in, which is a CPU's."""
        attention.attn_backend = _remembering(attention.attn_backend)
        self._bypassed.append(attention.layer_name)

    # While it runs ------------------------------------------------------------------------------------------------

    def note(self, vision_mask: Tensor | None) -> None:
        """Take the mask of the step that comes, bool ``[tokens]``, from the call that embeds its tokens."""
        self._noted = vision_mask

    @contextmanager
    def running(self, context: Any, tokens: int, device: torch.device, *, embedded: bool) -> Iterator[None]:
        """Know the rows of a forward of ``tokens`` rows in vLLM's forward ``context``; it ends with the block.

        ``embedded`` says that it is given embeddings, not token ids. Raises ``RuntimeError`` where nobody said which
        of them are vision tokens.
        """
        noted, self._noted = self._noted, None
        # Without metadata the forward measures memory or warms up, and its rows mean nothing.
        if context.attn_metadata is not None:
            if noted is None and embedded:
                raise RuntimeError("skipplan: the model was given embeddings without a mask of vision tokens")
            if noted is None:
                noted = torch.zeros(tokens, dtype=torch.bool)
            rows = Rows.of(noted, tokens, device)
            self.rows = rows if len(rows.vision) else None
            self._arrange(context, rows)
        try:
            yield
        finally:
            self.rows = None

    def _arrange(self, context: Any, rows: Rows) -> None:
        """Give split layers' attention metadata and slots of their own, in vLLM's tables of this step."""
        made: dict[int, Any] = {}
        for name in self._frozen if self.rows is not None and len(rows.text) else ():
            metadata = context.attn_metadata[name]
            group = id(metadata.skipplan_builder)
            if group not in made:
                made[group] = self._text_runs(metadata, rows)
            context.attn_metadata[name] = made[group]
        made.clear()
        for name in self._bypassed:
            metadata = context.attn_metadata[name]
            group = id(metadata.skipplan_builder)
            if group not in made:
                made[group] = self._text_only(metadata, rows)
            if made[group] is not None:
                context.attn_metadata[name], context.slot_mapping[name] = made[group]

    def _text_runs(self, metadata: Any, rows: Rows) -> Any:
        common = metadata.skipplan_common
        queries = text_runs(rows.vision_mask, common.query_start_loc, common.seq_lens)
        return _described(metadata, queries, len(rows.text), common.slot_mapping)

    def _text_only(self, metadata: Any, rows: Rows) -> tuple[Any, Tensor] | None:
        common, builder = metadata.skipplan_common, metadata.skipplan_builder
        vision = self._slots.setdefault(id(builder), VisionSlots())
        vision.write(common.slot_mapping, rows.vision_mask)
        if not len(rows.text):
            return None
        block_size = builder.kv_cache_spec.block_size
        computed = common.seq_lens.long() - (common.query_start_loc[1:] - common.query_start_loc[:-1]).long()
        before = vision.text_among(computed, common.block_table_tensor, block_size)
        queries, indices = text_only(rows.vision_mask, common.query_start_loc, before)
        request = torch.repeat_interleave(queries.request, (queries.query_start[1:] - queries.query_start[:-1]).long())
        slots = slots_of(indices, common.block_table_tensor[request], block_size).to(common.slot_mapping.dtype)
        return _described(metadata, queries, len(rows.text), slots), slots

    def store(self, attention: Any, keys: Tensor, values: Tensor, attend: Callable[..., Tensor]) -> None:
        """Store the keys and values of a step of vision rows alone, ``[tokens, heads * size]``, for later queries."""
        if attention.attn_backend.forward_includes_kv_cache_update:
            attend(keys.new_zeros(len(keys), attention.num_heads * attention.head_size), keys, values)
            return
        from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

        heads = attention.num_kv_heads
        unified_kv_cache_update(
            keys.view(-1, heads, attention.head_size),
            values.view(-1, heads, attention.head_size_v),
            attention.layer_name,
        )


def _described(metadata: Any, queries: Queries, tokens: int, slots: Tensor) -> Any:
    """Build the backend's metadata for ``queries``, ``tokens`` rows in all, on the caches of their requests."""
    common = metadata.skipplan_common
    described = type(common)(
        query_start_loc=queries.query_start,
        query_start_loc_cpu=queries.query_start,
        seq_lens=queries.seq_lens,
        num_reqs=len(queries.seq_lens),
        num_actual_tokens=tokens,
        max_query_len=queries.longest_query,
        max_seq_len=int(queries.seq_lens.max()),
        block_table_tensor=common.block_table_tensor[queries.request],
        slot_mapping=slots,
        seq_lens_cpu_upper_bound=queries.seq_lens,
    )
    return metadata.skipplan_builder.build(0, described)


@lru_cache
def _remembering(backend: Any) -> Any:
    """Make a backend whose metadata remember what they were built from, so that others can be built beside them."""
    from vllm.v1.attention.backend import subclass_attention_backend

    own: Any = backend.get_builder_cls()

    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = own.build(self, common_prefix_len, common_attn_metadata, fast_build)
        metadata.skipplan_common, metadata.skipplan_builder = common_attn_metadata, self
        return metadata

    builder = type("SkipPlan" + own.__name__, (own,), {"build": build})
    return subclass_attention_backend("SkipPlan", backend, builder)
