"""Making one layer of two: the attention of one layer and the MLP of a later one, where a plan runs nothing between.

What is left of such a gap is an ordinary layer, which a plain checkpoint can hold. Each part takes its norms along.
"""

from __future__ import annotations

from torch import nn

from .descriptor import FamilyDescriptor, validate
from .edits import Edits
from .families import describe_stack
from .layer_removal import renumber
from .locate import DecoderStack, locate
from .plan import Action, PlanError, SkipPlan
from .sublayers import Block, block_of


def is_joinable(model: nn.Module, plan: SkipPlan) -> bool:
    """Whether the model's layers can be joined as the plan says; a plan that joins none is fine."""
    stack = locate(model)
    try:
        require_joinable(stack, describe_stack(stack), plan)
    except PlanError:
        return False
    return True


def require_joinable(stack: DecoderStack, descriptor: FamilyDescriptor, plan: SkipPlan) -> None:
    """Raise :class:`PlanError` where two layers that the plan joins would be another layer than both are in turn."""
    removal = plan
    for first, last in plan.joins:
        reason = next(filter(None, (descriptor.reason(layer, Action.SKIP) for layer in (first, last))), "")
        reason = reason or _difference(stack, first, last)
        if reason:
            raise PlanError(f"layers {first} and {last} cannot become one, which takes code to run: {reason}")
        removal = removal.with_action(first, Action.RUN).with_action(last, Action.SKIP)
    validate(removal, descriptor)


def join_layers(edits: Edits, stack: DecoderStack, plan: SkipPlan) -> None:
    """Give the first layer of every pair that the plan joins the MLP of the second, which stays as it is."""
    for first, last in plan.joins:
        layer, other = stack.layers[first], stack.layers[last]
        for name in _block(stack, last).modules(Action.SKIP_MLP):
            part: nn.Module = getattr(other, name)
            renumber(edits, part, last, first)
            edits.set_item(layer._modules, name, part)


def _block(stack: DecoderStack, layer: int) -> Block:
    return block_of(stack.layers[layer], int(stack.text_config.hidden_size))


def _difference(stack: DecoderStack, first: int, last: int) -> str:
    """Say why the second layer's MLP would not do in the first layer what it does in its own; empty where it would."""
    layers = [stack.layers[each] for each in (first, last)]
    blocks = [_block(stack, each) for each in (first, last)]
    if type(layers[0]) is not type(layers[1]):
        return f"they are a {type(layers[0]).__name__} and a {type(layers[1]).__name__}"
    if not all(block.in_sequence for block in blocks):
        return "the MLP of a layer does not read what its attention adds"
    if blocks[0].mlp != blocks[1].mlp:
        return "they call their MLPs in different ways, as where one is a mixture of experts"
    for number, layer, block in zip((first, last), layers, blocks, strict=True):
        parts = {*block.modules(Action.SKIP_ATTENTION), *block.modules(Action.SKIP_MLP)}
        others = {name.partition(".")[0] for name, _ in (*layer.named_parameters(), *layer.named_buffers())} - parts
        if others:
            return f"layer {number} has weights beside its attention and its MLP: {', '.join(sorted(others))}"
    return ""
