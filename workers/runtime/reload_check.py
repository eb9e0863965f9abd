"""Would plain transformers rebuild the pruned model as it stands? Asked before a checkpoint is written.

Configurations have rules of their own when they are read (Gemma 4 turns the last layer into full attention). The
decoder is therefore built anew from the saved configuration, without memory for weights, and compared layer by layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .locate import DecoderStack, locate
from .plan import PlanError

PLAIN = (bool, int, float, str, type(None))


def require_faithful_reload(stack: DecoderStack) -> None:
    """Raise :class:`PlanError` when the model's configuration, saved and read, describes other decoder layers."""
    model: Any = stack.model
    try:
        with tempfile.TemporaryDirectory() as directory:
            model.config.save_pretrained(directory)
            config = type(model.config).from_pretrained(directory)
        rebuilt = _rebuild(stack, config)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PlanError(
            f"transformers could not load the {stack.family} model without these layers: {error}"
        ) from error
    if len(rebuilt) != len(stack.layers):
        raise PlanError(
            f"transformers would load {len(rebuilt)} of {len(stack.layers)} layers of the pruned {stack.family} model"
        )
    for index, (own, other) in enumerate(zip(stack.layers, rebuilt, strict=True)):
        for difference in _differences(own, other):
            raise PlanError(
                f"transformers would load layer {index} of the pruned {stack.family} model differently: {difference}"
            )


def _rebuild(stack: DecoderStack, config: Any) -> nn.ModuleList:
    with torch.device("meta"):
        if isinstance(stack.owner, PreTrainedModel):
            owner = type(stack.owner)._from_config(config.get_text_config(decoder=True))
            layers = getattr(owner, stack.path.rsplit(".", 1)[-1])
        else:
            layers = locate(type(stack.model)._from_config(config)).layers  # type: ignore[attr-defined]
    assert isinstance(layers, nn.ModuleList)
    return layers


def _differences(own: nn.Module, other: nn.Module) -> Iterator[str]:
    """List differences of two decoder layers: modules, plain attributes, shapes of weights."""
    modules, others = dict(own.named_modules()), dict(other.named_modules())
    for name in modules.keys() ^ others.keys():
        yield f"{name} exists in one of them only"
    for name in modules.keys() & others.keys():
        first, second = _facts(modules[name]), _facts(others[name])
        for key in first.keys() & second.keys():
            if first[key] != second[key]:
                yield f"{name or type(own).__name__}.{key} would be {second[key]!r} instead of {first[key]!r}"


def _facts(module: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": type(module).__name__}
    for name, value in vars(module).items():
        if name == "training" or name.startswith("_"):
            continue
        if isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, PLAIN) for v in value)):
            facts[name] = value
    for name, parameter in module.named_parameters(recurse=False):
        facts[name] = tuple(parameter.shape)
    return facts
