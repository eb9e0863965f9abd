"""Call a model's decoder one layer at a time.

Nothing about a family is rebuilt here. The model's own forward is run with recorders in place of its layers: what it
would have handed to each of them (masks, rotary embeddings, whatever else) is what they are handed later. In the same
way the model's own end, from the last layer to the logits, is run on rows that come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.errors import WorkersError
from workers.runtime.descriptor import FamilyDescriptor
from workers.runtime.edits import Edits
from workers.runtime.families import describe_stack, family_of, layer_kinds
from workers.runtime.locate import (
    CACHE_ARGUMENTS,
    MASK_ARGUMENTS,
    argument_name,
    forward_parameters,
    locate,
    shares_keys,
)
from workers.runtime.plan import Action
from workers.runtime.special_layers import VISION_ACTIONS
from workers.runtime.sublayers import Block, block_of, leave_out
from workers.runtime.text_cache import MergingCache
from workers.runtime.token_layers import TokenLayer, query_scale
from workers.runtime.token_rows import TokenRows, TokenSplit
from workers.runtime.vision_tokens import VisionTokens

from .hooks import Hooks, hidden_of

OWNER_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "inputs_embeds", "use_cache", "cache_position", *CACHE_ARGUMENTS}
)
"""What the decoder may be given besides settings: packed prompts know how to supply these."""

REMEMBERED = "rope_deltas"
"""What multimodal-rotary models keep of their last prompts' positions, and add to those of embeddings without ids."""

SLIDING = "sliding_attention"
KINDS = ("full_attention", SLIDING)


class NotExactError(WorkersError):
    """The fast path would not be exact for a model or a task; the message is the reason."""


@dataclass(frozen=True)
class Recording:
    """Arguments of a model's decoder and of each of its layers in one call, hidden states left out."""

    owner: dict[str, Any]
    """Named arguments of the decoder; ``inputs_embeds`` is ``[batch, tokens, hidden]``."""
    hidden: Tensor
    """The first layer's input, ``[batch, tokens, hidden]``."""
    layers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class LayerOutput:
    """A layer's result ``[batch, tokens, hidden]``, and what was watched in it, ``[batch, tokens, width]``.

    ``watched`` is zero in rows that did not go through the layer (frozen and bypassed vision tokens).
    """

    hidden: Tensor
    watched: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + (0 if self.watched is None else self.watched.nbytes)


@dataclass(frozen=True)
class Watch:
    """Watch a module within a layer: its input (``inputs``) or its output."""

    module: nn.Module
    inputs: bool = False

    def into(self, found: list[Tensor], hooks: Hooks) -> None:
        """Collect what is watched in ``found`` while the hooks are registered."""
        if self.inputs:
            hooks.before(self.module, lambda args, kwargs: found.append(args[0]))
        else:
            hooks.after(self.module, lambda output: found.append(hidden_of(output)))


@dataclass(frozen=True)
class Keys:
    """Keys and values of a layer's attention."""

    keys: Tensor
    values: Tensor

    def to(self, device: torch.device) -> Keys:
        """Return the same on a device: states are on the first, whichever a layer runs on."""
        return Keys(self.keys.to(device), self.values.to(device))

    def by_themselves(self) -> Keys:
        """Return the same, without what else a fused projection may have put into their memory."""
        return Keys(_by_itself(self.keys), _by_itself(self.values))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Decoder:
    """Call single decoder layers of a live model.

    Raises:
        NotExactError: a layer depends on more than hidden states, mask and positions.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stack = locate(model)
        self.descriptor: FamilyDescriptor = describe_stack(self.stack)
        self.kinds = layer_kinds(self.stack)
        self._require_plain_layers()
        self.layers: tuple[Any, ...] = tuple(self.stack.layers)
        self._blocks: dict[int, Block] = {}
        self.mask_name = argument_name(self.layers[0], MASK_ARGUMENTS) or MASK_ARGUMENTS[0]
        self._cache_name = argument_name(self.layers[0], CACHE_ARGUMENTS) or CACHE_ARGUMENTS[0]
        self._first_argument = next(iter(forward_parameters(self.layers[0])))
        self._split = _GivenSplit()
        mask_may_be_none = self.stack.text_config._attn_implementation == "sdpa"
        self._gathering = tuple(
            {
                action: TokenLayer(
                    layer,
                    number,
                    action,
                    self._split,
                    mask_may_be_none=mask_may_be_none,
                    block=self._block(number) if action.row.leaves_out else None,
                )
                for action in VISION_ACTIONS
                if action in self.descriptor.allowed[number]
            }
            for number, layer in enumerate(self.layers)
        )
        self._gives_tuple: bool | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """Number of logits at a position, as far as the configuration says it."""
        return int(self.stack.text_config.vocab_size)

    def _require_plain_layers(self) -> None:
        stack = self.stack
        for number, refused in enumerate(self.descriptor.refusals):
            if Action.FREEZE in refused:
                raise NotExactError(f"layer {number} cannot be given some rows of a sequence: {refused[Action.FREEZE]}")
        if family_of(stack).carried or any(shares_keys(layer) for layer in stack.layers):
            raise NotExactError("its layers hand each other more than hidden states")
        if any(query_scale(layer) is not None for layer in stack.layers):
            raise NotExactError("its layers scale queries by the number of tokens before them")
        odd = sorted(set(self.kinds) - set(KINDS))
        if odd:
            raise NotExactError(f"it has layers of kind {', '.join(odd)}")
        implementation = stack.text_config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise NotExactError(f"{implementation} attention takes no masks")

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., hidden]`` of token ids."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    # Recording ------------------------------------------------------------------------------------------------------

    def record(self, call: Callable[[], Any], *, run: bool = False) -> Recording:
        """Record the layers' arguments in a call of the model or its decoder; they run if ``run``, or if none has yet.

        Raises:
            NotExactError: the decoder is given something that packed prompts could not supply.
        """
        run = run or self._gives_tuple is None
        arguments: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def recorder(layer: Any) -> Callable[..., Any]:
            names, forward = tuple(forward_parameters(layer)), layer.forward

            def record(*args: Any, **kwargs: Any) -> Any:
                named = {**dict(zip(names, args, strict=False)), **kwargs}
                hidden = named.pop(self._first_argument)
                first.append(hidden) if not first else None
                arguments.append(named)
                if run:
                    output = forward(*args, **kwargs)
                    self._gives_tuple = isinstance(output, tuple)
                    return output
                return (hidden,) if self._gives_tuple else hidden

            return record

        owner: list[dict[str, Any]] = []
        named = tuple(forward_parameters(self.stack.owner))
        with Hooks() as hooks, self._in_place_of_layers([recorder(layer) for layer in self.layers]):
            hooks.before(
                self.stack.owner,
                lambda args, kwargs: owner.append({**dict(zip(named, args, strict=False)), **kwargs}),
            )
            call()
        if len(arguments) != len(self.layers) or len(owner) != 1:
            raise NotExactError(f"one call of the model calls {len(arguments)} layers, not {len(self.layers)}")
        return Recording(owner[0], first[0], tuple(arguments))

    @contextmanager
    def _in_place_of_layers(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[Edits]:
        edits = Edits()
        for layer, forward in zip(self.layers, forwards, strict=True):
            edits.set_instance_attribute(layer, "forward", forward)
        try:
            yield edits
        finally:
            edits.undo()

    def dry_run(self, embeddings: Tensor, position_ids: Tensor) -> Recording:
        """Record the layers' arguments for packed ``embeddings``, ``[batch, tokens, hidden]``; no layer runs."""
        owner = self.stack.owner
        return self.record(lambda: owner(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False))

    # Running --------------------------------------------------------------------------------------------------------

    def run(self, layer: int, hidden: Tensor, arguments: dict[str, Any], watch: Watch | None = None) -> LayerOutput:
        """Run one layer over all rows of ``hidden``, ``[batch, tokens, hidden]``."""
        return self._watched(lambda: self.layers[layer](hidden, **arguments), watch, None, hidden)

    def run_rows(
        self,
        layer: int,
        action: Action,
        split: TokenSplit | None,
        hidden: Tensor,
        arguments: dict[str, Any],
        watch: Watch | None = None,
    ) -> LayerOutput:
        """Run one layer over the rows ``split.text``; the others keep their state.

        With ``FREEZE`` the other rows give keys and values, with ``BYPASS`` they are not seen; with actions that freeze
        a part of the layer, they go through the other part. An action that leaves a part of the layer out goes for all
        rows.
        """
        if action.row.removes_part:
            with self.without(layer, action):
                return self.run(layer, hidden, arguments, watch)
        if split is None:
            return self.run(layer, hidden, arguments, watch)
        self._split.current = split
        gathering = self._gathering[layer][action]
        return self._watched(lambda: gathering(hidden, **arguments), watch, split, hidden)

    def run_text(
        self,
        layer: int,
        action: Action,
        split: TokenSplit,
        hidden: Tensor,
        arguments: dict[str, Any],
        watch: Watch | None = None,
    ) -> LayerOutput:
        """Run one layer over the rows ``split.text`` alone: what it does to text under an action.

        The other rows are seen, as ``arguments`` have it, and keep their state.
        """
        with self.without(layer, action):
            if action.row.keeps_keys:
                return self.run_rows(layer, Action.FREEZE, split, hidden, arguments, watch)
            rows = split.text.take(hidden, hidden.dim() - 2, hidden.dim() - 3)
            given = self._gathering[layer][Action.FREEZE].rows_of(split.text, arguments)  # its MLP may read some
            own = self._watched(lambda: self.layers[layer](rows, **given), watch, split, hidden)
            return replace(own, hidden=split.text.put(hidden, own.hidden))

    @contextmanager
    def without(self, layer: int, action: Action) -> Iterator[None]:
        """Have a layer run without the part that an action leaves out for every token, if it does."""
        if not action.row.removes_part:
            yield
            return
        edits = Edits()
        try:
            leave_out(edits, self.layers[layer], self._block(layer), layer, action)
            yield
        finally:
            edits.undo()

    def _block(self, layer: int) -> Block:
        if layer not in self._blocks:
            self._blocks[layer] = block_of(self.layers[layer], int(self.stack.text_config.hidden_size))
        return self._blocks[layer]

    def run_with_keys(
        self, layer: int, hidden: Tensor, arguments: dict[str, Any], watch: Watch | None = None
    ) -> tuple[LayerOutput, Keys]:
        """As :meth:`run`, and the layer's keys and values, ``[batch, heads, tokens, size]`` each."""
        seen: list[Keys] = []

        def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(Keys(keys, values).to(hidden.device))
            return keys, values

        output = self.run(layer, hidden, {**arguments, self._cache_name: MergingCache(None, note)}, watch)
        return output, seen[-1]

    def keys(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> Keys:
        """Keys and values of a layer for all rows of ``hidden``, ``[batch, heads, tokens, size]`` each."""
        captured = self._gathering[layer][Action.FREEZE].capture(hidden, arguments)
        return Keys(captured.keys, captured.values).to(hidden.device)

    def arguments_of(self, layer: int, rows: TokenRows, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments, made for all tokens, for some of them, which see what they saw."""
        return self._gathering[layer][Action.FREEZE].arguments_of(rows, arguments)

    def run_new(
        self,
        layer: int,
        rows: TokenRows,
        hidden: Tensor,
        arguments: dict[str, Any],
        seen: Keys,
        watch: Watch | None = None,
    ) -> LayerOutput:
        """Run one layer over ``hidden``, ``[batch, new tokens, hidden]``, which stand at ``rows`` of longer sequences.

        ``seen`` is what attention sees of these, ``[batch x tokens, heads, size]`` each: the new tokens' keys and
        values are filled in.
        """

        def fill(into: Tensor, new: Tensor) -> Tensor:
            states = new.to(into.device).transpose(1, 2).flatten(0, 1).index_select(0, rows.source)
            filled = into.index_copy_(0, rows.target, states).view(rows.batch, rows.length, *states.shape[1:])
            return filled.transpose(1, 2).to(new.device)

        cache = MergingCache(None, lambda keys, values: (fill(seen.keys, keys), fill(seen.values, values)))
        given = {**self.arguments_of(layer, rows, arguments), self._cache_name: cache}
        return self._watched(lambda: self.layers[layer](hidden, **given), watch, None, hidden)

    def _watched(
        self, call: Callable[[], Any], watch: Watch | None, split: TokenSplit | None, hidden: Tensor
    ) -> LayerOutput:
        if watch is None:
            return LayerOutput(hidden_of(call()))
        found: list[Tensor] = []
        with Hooks() as hooks:
            watch.into(found, hooks)
            output = hidden_of(call())
        own = [each.to(hidden.device).reshape(*hidden.shape[:-2], -1, each.shape[-1]) for each in found]
        rows = own[-1]
        if split is not None and rows.shape[:-1] != hidden.shape[:-1]:  # text's, and behind it vision's, if it ran
            rows = rows.new_zeros(*hidden.shape[:-1], rows.shape[-1])
            for each, part in zip(own, (split.text, split.vision), strict=False):
                rows = part.put(rows, each)
        return LayerOutput(output, rows)

    def logits(self, rows: Tensor) -> Tensor:
        """Return the model's own logits ``[rows, vocabulary]`` in float32 for last-layer states ``[rows, hidden]``."""
        states = rows[:, None]

        def give(*args: Any, **kwargs: Any) -> Any:
            return (states,) if self._gives_tuple else states

        with self._in_place_of_layers([give] * len(self.layers)) as edits:
            for module in self.model.modules():
                if REMEMBERED in module.__dict__:
                    edits.set_instance_attribute(module, REMEMBERED, None)
            logits: Tensor = self.model(inputs_embeds=states, use_cache=False).logits
        return logits[:, -1].float()


def _by_itself(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


class _GivenSplit(VisionTokens):
    """Give frozen and bypassed layers the split that was set last."""

    def __init__(self) -> None:
        super().__init__(())
        self.current: TokenSplit | None = None

    def split_for(
        self, hidden_states: Tensor, past: Callable[[], int], *, last_tokens: bool = False
    ) -> TokenSplit | None:
        return self.current
