"""What each action means, written the slow and obvious way on the whole model.

Every layer is present and computed, nothing is cached, every prompt goes alone and without padding. Then

- skip: the layer's output is replaced by its input;
- freeze: the layer's output at vision tokens is replaced by its input there;
- bypass: the same, and in that layer text tokens cannot attend to vision tokens;
- skip attention, skip MLP: what that module returns is replaced by zeros;
- freeze attention, freeze MLP: the same, at vision tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .tiny import Family, Prompt, batch_inputs, decoder_layers, forget_positions, vision_mask


@contextmanager
def reference_plan(model: PreTrainedModel, family: Family, plan: str, ids: Tensor) -> Iterator[None]:
    """Hooks that make `model` compute `plan` for the one sequence `ids` of shape [tokens]."""
    vision = vision_mask(family, ids)
    handles = []
    for layer, letter in zip(decoder_layers(model, family), plan, strict=True):
        if letter == "B":
            handles.append(layer.register_forward_pre_hook(_hide_vision_from_text(vision), with_kwargs=True))
            handles.append(layer.register_forward_hook(_text_alone(vision), with_kwargs=True))
        if letter in PARTS:
            (name,) = PARTS[letter] & {name for name, _ in layer.named_children()}
            rows = torch.ones_like(vision) if letter in "AM" else vision
            handles.append(layer.get_submodule(name).register_forward_hook(_zeros(rows)))
        if letter in "SFB":
            rows = torch.ones_like(vision) if letter == "S" else vision
            handles.append(layer.register_forward_hook(_put_back(rows), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference_logits(
    model: PreTrainedModel, family: Family, plan: str, prompt: Prompt, answer: Sequence[int] = ()
) -> Tensor:
    """Logits [tokens, vocabulary] of a prompt followed by `answer`, for a model with eager attention."""
    assert model.config.get_text_config()._attn_implementation == "eager", "the bypass mask needs eager attention"
    inputs = batch_inputs(family, [prompt], [list(answer)])
    forget_positions(model)
    with torch.no_grad(), reference_plan(model, family, plan, inputs["input_ids"][0]):
        outputs = model(**inputs, use_cache=False)
    forget_positions(model)
    return outputs.logits[0]


Hook = Callable[..., Any]
ATTENTION, MLP = {"self_attn", "attention"}, {"mlp", "feed_forward", "ffn", "fc2"}
PARTS = {"A": ATTENTION, "M": MLP, "Q": ATTENTION, "P": MLP}


def _zeros(rows: Tensor) -> Hook:
    """A forward hook that takes away what attention or an MLP adds to `rows` ([tokens], bool)."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        added = output[0] if isinstance(output, tuple) else output
        assert added.shape[-2] == len(rows)
        zeroed = torch.where(rows[:, None], torch.zeros_like(added), added)
        return (zeroed, *output[1:]) if isinstance(output, tuple) else zeroed

    return hook


def _named(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a layer's call by name; some families pass the mask by position."""
    names = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]
    return {**dict(zip(names, arguments, strict=False)), **keywords}


def _put_back(rows: Tensor) -> Hook:
    """A forward hook that restores `rows` ([tokens], bool) of a layer's hidden state to its input."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        before = _named(layer, arguments, keywords)["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        assert after.shape == before.shape
        axis = next(axis for axis in (-2, 1, 2) if after.shape[axis] == len(rows))  # some have several streams
        restored = torch.where(
            rows.view([-1 if at == axis % after.dim() else 1 for at in range(after.dim())]), before, after
        )
        return (restored, *output[1:]) if isinstance(output, tuple) else restored

    return hook


def _hide_vision_from_text(vision: Tensor) -> Hook:
    """A pre-hook that adds to the layer's additive mask [1, heads or 1, tokens, tokens]: no text row sees vision."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        named = _named(layer, arguments, keywords)
        mask = named["attention_mask"]
        if not vision.any() or mask is None or mask.dim() != 4:
            return None
        assert mask.is_floating_point(), mask.dtype
        hidden = ~vision[:, None] & vision[None, :]
        return (), {**named, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    return hook


def _text_alone(vision: Tensor) -> Hook:
    """A forward hook for layers that mix tokens without attention: text rows as if vision tokens were not there."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        named = _named(layer, arguments, keywords)
        hidden, mask = named["hidden_states"], named["attention_mask"]
        if not vision.any() or (mask is not None and mask.dim() == 4):
            return None
        assert isinstance(output, Tensor) and hidden.dim() == 3
        others = {key: value for key, value in named.items() if key not in ("hidden_states", "attention_mask")}
        text = type(layer).forward(layer, hidden[:, ~vision], attention_mask=None, **others)
        return output.index_copy(1, (~vision).nonzero()[:, 0], text)

    return hook
