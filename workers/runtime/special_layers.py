"""Handle what single families have beyond the tables: injected features, shared keys, per-layer embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .descriptor import KeepOne, UnsupportedFamilyError
from .edits import Edits
from .layer_config import Kept, LayerNames, keep_layers, renumbering, stored
from .locate import DecoderStack
from .plan import Action

Refusals = list[dict[Action, str]]
OnRemoval = Callable[[Edits, DecoderStack, Kept, bool], None]
"""Called with the kept layers before they are renumbered, and whether the change is permanent."""

VISION_ACTIONS = tuple(action for action in Action if action.row.vision_only)
SPLITTING_ACTIONS = tuple(action for action in Action if action.row.splits_attention)
PARTIAL_ACTIONS = tuple(action for action in Action if action.row.leaves_out)
KEYLESS_ACTIONS = tuple(action for action in Action if not action.row.keeps_keys)
BLOCKS_OF_LAYERS = ("embed_tokens_per_layer", "per_layer_model_projection")
"""Modules whose results hold a block per layer, side by side in the last dimension."""


def refuse(refusals: Refusals, layers: Iterable[int], actions: Iterable[Action], reason: str) -> None:
    """Refuse ``actions`` at ``layers``; a reason given earlier stays."""
    actions = tuple(actions)
    for layer in layers:
        for action in actions:
            refusals[layer].setdefault(action, reason)


def refuse_deepstack_layers(stack: DecoderStack, refusals: Refusals) -> None:
    """Vision features are added behind list positions 0, 1, ...: those layers hold the places."""
    vision: Any = getattr(stack.model.config, "vision_config", None)
    levels = getattr(vision, "deepstack_visual_indexes", None)
    injected = len(stack.layers) if levels is None else len(levels)
    reason = f"vision features are added behind the first {injected} layers, by their place in the list (deepstack)"
    refuse(refusals, range(min(injected, len(stack.layers))), (Action.SKIP,), reason)


def refuse_mapped_deepstack_layers(stack: DecoderStack, refusals: Refusals) -> None:
    """Vision features are added before the layers that the configuration lists."""
    config: Any = stack.model.config
    targets = {target for _, target in config.deepstack_layer_map or ()} | set(config.spatial_target_layers or ())
    refuse(
        refusals,
        sorted(targets & set(range(len(stack.layers)))),
        (Action.SKIP,),
        "vision features are added in front of it (deepstack)",
    )


def remap_deepstack(edits: Edits, stack: DecoderStack, kept: Kept, permanent: bool) -> None:
    """Have vision features added before the same layers, by their new numbers."""
    config: Any = stack.model.config
    new_index = renumbering(kept.layers)
    # A target behind the last layer never comes up, before or after.
    remapped = [(source, new_index.get(target, target)) for source, target in config.deepstack_layer_map or ()]
    edits.set_item(stored(config), "deepstack_layer_map", remapped)
    spatial = [new_index.get(target, target) for target in config.spatial_target_layers or ()]
    edits.set_item(stored(config), "spatial_target_layers", spatial)


def self_attention_before_cross_attention(stack: DecoderStack) -> tuple[KeepOne, ...]:
    """Text-only prompts read the sequence length from the cache of the first layer, which must have one."""
    cross = tuple(stack.text_config.cross_attention_layers)
    own = tuple(layer for layer in range(len(stack.layers)) if layer not in cross)
    reason = "a self-attention layer must come before the first cross-attention layer, or text-only prompts go wrong"
    return (KeepOne(own, reason, before=cross), KeepOne(own, "one self-attention layer must stay"))


def _sharing_modes(stack: DecoderStack) -> Sequence[str | None]:
    """Read by layer whether it stores its keys for later layers (``"store"``) or uses those of one (``"reuse"``)."""
    modes: Sequence[str | None] | None = getattr(stack.text_config, "kv_sharing_modes", None)
    if modes is None:
        raise UnsupportedFamilyError(
            f"which of its layers share keys and values cannot be read from transformers {transformers.__version__}; "
            "its plans need 5.23 or newer"
        )
    return modes


def refuse_shared_keys(stack: DecoderStack, refusals: Refusals) -> None:
    """Later layers use the keys of the last earlier layer of their kind, vision tokens' included."""
    modes = _sharing_modes(stack)
    consumers = [layer for layer, mode in enumerate(modes) if mode == "reuse"]
    providers = [layer for layer, mode in enumerate(modes) if mode == "store"]
    if not consumers:
        return
    refuse(refusals, providers, KEYLESS_ACTIONS, "later layers use its keys and values (KV sharing)")
    refuse(refusals, providers, (Action.BYPASS,), "later layers use its keys and values of vision tokens (KV sharing)")
    refuse(refusals, consumers, (Action.BYPASS,), "its keys and values are those of an earlier layer (KV sharing)")


def store_keys_as_reloaded(edits: Edits, stack: DecoderStack, kept: Kept, permanent: bool) -> None:
    """Have layers keep their keys for others where the shallower configuration says so, as transformers builds them."""
    after = copy(stack.text_config)
    keep_layers(Edits(), after, LayerNames(), len(stack.layers), kept)
    for old, mode in zip(kept.layers, after.kv_sharing_modes, strict=True):
        for module in stack.layers[old].modules():
            if "store_full_length_kv" in module.__dict__:
                edits.set_instance_attribute(module, "store_full_length_kv", mode == "store")


def slice_per_layer_embeddings(edits: Edits, stack: DecoderStack, kept: Kept, permanent: bool) -> None:
    """Keep the blocks of the kept layers: of the weights for good, or of what they give while a plan is applied."""
    if not getattr(stack.text_config, "hidden_size_per_layer_input", None):
        return
    layers = len(stack.layers)
    for name in BLOCKS_OF_LAYERS:
        module = getattr(stack.owner, name)
        if permanent:
            _slice_weight(edits, module, layers, kept.layers)
        else:
            edits.set_instance_attribute(module, "forward", _blocks_of(module.forward, layers, kept.layers))


def _blocks_of(forward: Callable[[Tensor], Tensor], layers: int, kept: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def selected(inputs: Tensor) -> Tensor:
        blocks = forward(inputs)  # [batch, tokens, layers * size]
        index = torch.tensor(kept, device=blocks.device)
        shape = (*blocks.shape[:-1], layers, blocks.shape[-1] // layers)
        return blocks.view(shape).index_select(-2, index).flatten(-2)

    return selected


def _slice_weight(edits: Edits, module: nn.Module, layers: int, kept: Sequence[int]) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    dim, width_name = (1, "embedding_dim") if isinstance(module, nn.Embedding) else (0, "out_features")
    index = torch.tensor(kept, device=weight.device)
    size = weight.shape[dim] // layers
    shape = (*weight.shape[:dim], layers, size, *weight.shape[dim + 1 :])
    blocks = weight.detach().view(shape).index_select(dim, index).flatten(dim, dim + 1)
    sliced = nn.Parameter(blocks.contiguous(), requires_grad=weight.requires_grad)
    edits.set_item(module._parameters, "weight", sliced)
    edits.set_instance_attribute(module, width_name, len(kept) * size)
