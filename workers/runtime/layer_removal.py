"""Taking decoder layers out of a live model, so that what is left is an ordinary, shallower model of its family."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .edits import Edits
from .families import family_of
from .layer_config import Kept, keep_layers, keep_values, renumbering
from .locate import INDEX_ATTRIBUTES, DecoderStack, ancestors

HOOKS_INSTALLED = "_output_capturing_hooks_installed"


def remove_layers(edits: Edits, stack: DecoderStack, kept: Kept, *, permanent: bool) -> None:
    """Leave only the layers ``kept`` in the model: module list, layer numbers, configuration, per-layer weights.

    Their MLPs are in their places already (:mod:`workers.runtime.joining`).

    ``permanent`` slices weights that hold a block per layer; otherwise their results are sliced, which copies nothing.
    """
    family = family_of(stack)
    for change in family.on_removal:
        change(edits, stack, kept, permanent)
    layers = dict(stack.layers._modules)
    num_layers = len(layers)
    _forget_lazy_hooks(edits, stack)
    for old, new in renumbering(kept.layers).items():
        if old != new:
            renumber(edits, stack.layers[old], old, new)
    remaining = {str(new): layers[str(old)] for new, old in enumerate(kept.layers)}
    edits.set_instance_attribute(stack.layers, "_modules", remaining)
    for config in stack.configs:
        keep_layers(edits, config, family.names, num_layers, kept)
    keep_values(edits, stack.owner.__dict__, family.names, num_layers, kept)


def renumber(edits: Edits, part: nn.Module, old: int, new: int) -> None:
    """Give a layer, or a part of it, and all modules inside its new number."""
    for module in part.modules():
        for name in INDEX_ATTRIBUTES:
            value = module.__dict__.get(name)
            if value == old and not isinstance(value, bool):
                edits.set_instance_attribute(module, name, new)


def _forget_lazy_hooks(edits: Edits, stack: DecoderStack) -> None:
    """Have transformers install its output-recording hooks anew after the layers are back.

    It installs them once, when hidden states are first asked for, on the layers that are there at that moment.
    """
    models = [module for module in ancestors(stack.model, stack.path) if isinstance(module, PreTrainedModel)]
    before = [getattr(module, HOOKS_INSTALLED, False) for module in models]

    def forget() -> None:
        for module, installed in zip(models, before, strict=True):
            if installed or not getattr(module, HOOKS_INSTALLED, False):
                continue
            for inner in module.modules():
                for key, hook in list(inner._forward_hooks.items()):
                    if "output_capturing_hook" in getattr(hook, "__qualname__", ""):
                        del inner._forward_hooks[key]
                inner.__dict__.pop(HOOKS_INSTALLED, None)

    edits.on_undo(forget)
