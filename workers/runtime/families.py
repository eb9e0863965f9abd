"""Model families as data: what inspection alone cannot know, and the description of a model built from both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .descriptor import FamilyDescriptor, KeepOne
from .edits import Edits
from .layer_config import LayerNames, unknown_per_layer_lists
from .locate import DecoderStack, locate, vision_token_ids
from .plan import Action

Refusals = list[dict[Action, str]]


@dataclass(frozen=True)
class Family:
    """What one family adds to what inspection finds."""

    names: LayerNames = field(default_factory=LayerNames)
    restrict: tuple[Callable[[DecoderStack, Refusals], None], ...] = ()
    """Each adds reasons to the refusals, layer by layer."""
    on_removal: tuple[Callable[[Edits, DecoderStack, Sequence[int], bool], None], ...] = ()
    """Each changes what only this family has when layers leave: called with the kept layers, before they are
    renumbered, and whether the change is permanent."""


DEFAULT = Family()
FAMILIES: Mapping[str, Family] = {}
"""By the text configuration's ``model_type``; most families need no entry."""

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
APPLIED = "_skipplan_applied"


def family_of(stack: DecoderStack) -> Family:
    """The family's entry, or the default one."""
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
    vision_ids = vision_token_ids(stack.model.config)
    refusals: Refusals = [{} for _ in range(num_layers)]
    kinds = layer_kinds(stack)
    if not vision_ids:
        _refuse(refusals, range(num_layers), (Action.FREEZE, Action.BYPASS), "the model has no vision tokens")
    for layer, kind in enumerate(kinds):
        if kind not in ATTENTION_KINDS:
            reason = f"it is a {kind} layer, whose state mixes tokens outside the KV cache"
            _refuse(refusals, (layer,), (Action.FREEZE, Action.BYPASS), reason)
    for name in unknown_per_layer_lists(stack.text_config, family.names, num_layers):
        reason = f"the configuration's list {name!r} has one entry per layer and its meaning is not known"
        _refuse(refusals, range(num_layers), (Action.SKIP,), reason)
    for restrict in family.restrict:
        restrict(stack, refusals)
    return FamilyDescriptor(
        family=stack.family,
        num_layers=num_layers,
        stack_path=stack.path,
        vision_token_ids=vision_ids,
        refusals=tuple(refusals),
        keep_one=_keep_one(kinds),
    )


def layer_kinds(stack: DecoderStack) -> tuple[str, ...]:
    """Per layer the kind of token mixing, in transformers' words (``"full_attention"`` when nothing is said)."""
    kinds: Sequence[str] | None = getattr(stack.text_config, "layer_types", None)
    if kinds is None or len(kinds) != len(stack.layers):
        return ("full_attention",) * len(stack.layers)
    return tuple(kinds)


def _keep_one(kinds: tuple[str, ...]) -> tuple[KeepOne, ...]:
    attention = tuple(layer for layer, kind in enumerate(kinds) if "attention" in kind and kind != "linear_attention")
    if len(attention) in (0, len(kinds)):
        return ()
    return (KeepOne(attention, "the cache takes its length from an attention layer, so one must stay"),)


def _refuse(refusals: Refusals, layers: Sequence[int], actions: Sequence[Action], reason: str) -> None:
    for layer in layers:
        for action in actions:
            refusals[layer].setdefault(action, reason)


def uses(stack: DecoderStack, name: str) -> Any:
    """A text configuration attribute, or ``None``."""
    return getattr(stack.text_config, name, None)
