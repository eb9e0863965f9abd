"""Model families as data: what inspection alone cannot know, and the description of a model built from both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from . import special_layers as special
from .descriptor import FamilyDescriptor, KeepOne
from .layer_config import LayerNames, unknown_per_layer_lists
from .locate import CACHE_ARGUMENTS, DecoderStack, argument_name, locate, vision_token_ids
from .loop_guard import attribute_uses, counts_rows, loop_facts
from .plan import Action
from .special_layers import PARTIAL_ACTIONS, SPLITTING_ACTIONS, VISION_ACTIONS, OnRemoval, Refusals, refuse
from .sublayers import NotSeparableError, block_of
from .token_layers import scales_queries_by_row
from .vision_tokens import takes_vision


@dataclass(frozen=True)
class Family:
    """Facts about one family that inspection cannot find."""

    names: LayerNames = field(default_factory=LayerNames)
    loop_uses: frozenset[str] = frozenset()
    """Uses of a layer's position in the decoder's loop, the position called ``i``, that are taken care of."""
    carried: frozenset[str] = frozenset()
    """What the loop sets anew between layers that is taken care of."""
    restrict: tuple[Callable[[DecoderStack, Refusals], None], ...] = ()
    """Each adds reasons to the refusals, layer by layer."""
    keep_one: Callable[[DecoderStack], tuple[KeepOne, ...]] = lambda stack: ()
    """Further sets of layers of which one must stay."""
    on_removal: tuple[OnRemoval, ...] = ()
    """Each changes what only this family has when layers leave."""
    no_vision_tokens: str = ""
    """Why the decoder's sequence has no vision tokens although the model sees."""


DEEPSTACK_USES = frozenset(
    {
        "i in range(len(deepstack_visual_embeds))",
        "i < len(deepstack_visual_embeds)",
        "deepstack_visual_embeds[i]",
    }
)
DEEPSTACK = Family(loop_uses=DEEPSTACK_USES, restrict=(special.refuse_deepstack_layers,))
PER_LAYER_EMBEDDINGS = Family(
    # From the first layer that shares keys on, Gemma 4 goes on with the last tokens only.
    carried=frozenset({"causal_mask_mapping", "position_embeddings", "per_layer_inputs"}),
    restrict=(special.refuse_shared_keys,),
    on_removal=(special.slice_per_layer_embeddings, special.store_keys_as_reloaded),
)
CROSS_ATTENTION = "image features enter through cross-attention layers, not as tokens of the sequence"

DEFAULT = Family()
FAMILIES: Mapping[str, Family] = {
    "cohere_compass_text": DEEPSTACK,
    "qwen3_vl_text": DEEPSTACK,
    "qwen3_vl_moe_text": DEEPSTACK,
    "qwen3_omni_moe_text": DEEPSTACK,
    "granite_docling_text": DEEPSTACK,
    "granite4_vision_text": Family(
        loop_uses=frozenset({"i in deepstack_features", "deepstack_features[i]"}),
        restrict=(special.refuse_mapped_deepstack_layers,),
        on_removal=(special.remap_deepstack,),
    ),
    "gemma3n_text": PER_LAYER_EMBEDDINGS,
    "gemma4_text": PER_LAYER_EMBEDDINGS,
    "gemma4_unified_text": PER_LAYER_EMBEDDINGS,
    "mllama_text_model": Family(
        loop_uses=frozenset(
            {
                "_has_cached_cross_attention_states(cache, i)",
                "_has_cached_cross_attention_states(past_key_values, i)",  # before transformers 5.24
                "past_key_values.get_seq_length(i)",  # before 5.20
            }
        ),
        keep_one=special.self_attention_before_cross_attention,
        no_vision_tokens=CROSS_ATTENTION,
    ),
    "idefics": Family(no_vision_tokens=CROSS_ATTENTION),
}
"""By the text configuration's ``model_type``; most families need no entry."""

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
POSITION_BIASES = ("alibi", "position_bias")
"""Arguments of layers whose attention adds a bias that is made for all keys of a whole sequence."""
APPLIED = "_skipplan_applied"


def family_of(stack: DecoderStack) -> Family:
    """Return the family's entry, or the default one."""
    return FAMILIES.get(str(stack.text_config.model_type), DEFAULT)


def describe(model: nn.Module) -> FamilyDescriptor:
    """Describe what the decoder layers of ``model`` may do.

    While a plan is applied, the description is that of the model without it. Raises
    :class:`UnsupportedFamilyError` naming what was not found or not understood.
    """
    stack = locate(model)
    applied = stack.layers.__dict__.get(APPLIED)
    if applied is not None:
        described: FamilyDescriptor = applied.descriptor
        return described
    return describe_stack(stack)


def describe_stack(stack: DecoderStack) -> FamilyDescriptor:
    """Describe a located decoder without any plan applied."""
    family = family_of(stack)
    num_layers = len(stack.layers)
    kinds = layer_kinds(stack)
    refusals: Refusals = [{} for _ in range(num_layers)]
    vision_ids = () if family.no_vision_tokens else vision_token_ids(stack.model.config)
    if not vision_ids:
        reason = family.no_vision_tokens or "the configuration names no placeholder token of images or videos"
        refuse(refusals, range(num_layers), VISION_ACTIONS, reason)
    elif not takes_vision(stack):
        reason = "the model takes no image inputs by a name that is known, so prompts with images cannot be told apart"
        refuse(refusals, range(num_layers), VISION_ACTIONS, reason)
    _refuse_by_kind(stack, kinds, refusals)
    _refuse_by_block(stack, kinds, refusals)
    _refuse_by_names(stack, family, refusals)
    for restrict in family.restrict:
        restrict(stack, refusals)
    return FamilyDescriptor(
        family=stack.family,
        num_layers=num_layers,
        stack_path=stack.path,
        vision_token_ids=vision_ids,
        refusals=tuple(refusals),
        keep_one=(*_keep_attention(kinds), *family.keep_one(stack)),
    )


def layer_kinds(stack: DecoderStack) -> tuple[str, ...]:
    """Per layer the kind of token mixing, in transformers' words (``"full_attention"`` when nothing is said)."""
    for name in ("layer_types", "layers_block_type"):
        kinds: Sequence[str] | None = getattr(stack.text_config, name, None)
        if kinds is not None and len(kinds) == len(stack.layers):
            return tuple(kinds)
    return ("full_attention",) * len(stack.layers)


def _keep_attention(kinds: tuple[str, ...]) -> Iterable[KeepOne]:
    attention = tuple(layer for layer, kind in enumerate(kinds) if "attention" in kind and kind != "linear_attention")
    if len(attention) not in (0, len(kinds)):
        yield KeepOne(attention, "the cache takes its length from an attention layer, so one must stay")


def _refuse_by_kind(stack: DecoderStack, kinds: tuple[str, ...], refusals: Refusals) -> None:
    """Refuse to ask for text alone where tokens are mixed by anything but attention over a KV cache."""
    for index, (layer, kind) in enumerate(zip(stack.layers, kinds, strict=True)):
        if kind == "indexed_attention":
            refuse(refusals, (index,), SPLITTING_ACTIONS, "its attention picks keys by an index over all tokens")
        elif kind not in ATTENTION_KINDS:
            reason = f"its kind is {kind}, and tokens can be split in layers of attention over a plain KV cache only"
            refuse(refusals, (index,), SPLITTING_ACTIONS, reason)
        elif named := argument_name(layer, POSITION_BIASES):
            if getattr(stack.text_config, named, True):  # Falcon says whether it uses its own
                reason = f"its attention adds {named}, a bias for each key's position, which cannot be given in part"
                refuse(refusals, (index,), SPLITTING_ACTIONS, reason)
        elif any(isinstance(module, nn.Conv1d) for module in layer.modules()):
            refuse(refusals, (index,), SPLITTING_ACTIONS, "it mixes neighbouring tokens by convolution")
        elif named := counts_rows(layer, CACHE_ARGUMENTS, scales_queries_by_row):
            reason = f"{named} counts its rows or reaches into the cache, so it cannot be given some rows only"
            refuse(refusals, (index,), SPLITTING_ACTIONS, reason)


def _refuse_by_block(stack: DecoderStack, kinds: tuple[str, ...], refusals: Refusals) -> None:
    """Refuse to leave out a part where a block cannot be taken apart, and what keeps more than keys and values."""
    without_attention = [action for action in PARTIAL_ACTIONS if not action.row.keeps_keys]
    for index, (layer, kind) in enumerate(zip(stack.layers, kinds, strict=True)):
        try:
            block = block_of(layer, int(stack.text_config.hidden_size))
        except NotSeparableError as error:
            refuse(refusals, (index,), PARTIAL_ACTIONS, str(error))
        else:
            of_mlp = (module for name in block.modules(Action.FREEZE_MLP) for module in getattr(layer, name).modules())
            if any(isinstance(module, nn.Conv1d) for module in of_mlp):
                refuse(refusals, (index,), (Action.FREEZE_MLP,), "its MLP mixes neighbouring tokens by convolution")
        if kind not in ATTENTION_KINDS:
            reason = f"its kind is {kind}, and what is left out is attention over a plain KV cache only"
            refuse(refusals, (index,), without_attention, reason)


def _refuse_by_names(stack: DecoderStack, family: Family, refusals: Refusals) -> None:
    """Refuse what depends on a layer's place in a way that no table names."""
    everywhere = range(len(stack.layers))
    for name in unknown_per_layer_lists(stack.text_config, family.names, len(stack.layers)):
        reason = f"the configuration's list {name!r} has one entry per layer and its meaning is not known"
        refuse(refusals, everywhere, (Action.SKIP,), reason)
    list_name = stack.path.rsplit(".", 1)[-1]
    facts = loop_facts(stack.owner, list_name)
    owner = type(stack.owner).__name__
    if not facts.found:
        reason = f"no single loop over {list_name} was found in {owner}.forward, so it cannot be checked"
        refuse(refusals, everywhere, (Action.SKIP, *VISION_ACTIONS), reason)
    known = family.names.sliced | family.names.indices | family.names.leading
    unknown = attribute_uses(facts, known) - family.loop_uses
    if unknown:
        reason = f"{owner} depends on the layer's position in a way that is not known: {', '.join(sorted(unknown))}"
        refuse(refusals, everywhere, (Action.SKIP,), reason)
    carried = facts.carried - family.carried
    if carried:
        reason = f"layers of {owner} hand each other more than hidden states: {', '.join(sorted(carried))}"
        refuse(refusals, everywhere, (Action.SKIP, *VISION_ACTIONS, *PARTIAL_ACTIONS), reason)
