"""What each action means, written the slow and obvious way on the whole model.

Every layer is present and computed, nothing is cached, every prompt goes alone and without padding. Then

- skip: the layer's output is replaced by its input;
- freeze: the layer's output at vision tokens is replaced by its input there;
- bypass: the same, and in that layer text tokens cannot attend to vision tokens.

Generation runs the whole sequence again for every token.
"""

from __future__ import annotations

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


def reference_generation(
    model: PreTrainedModel, family: Family, plan: str, prompt: Prompt, length: int, suppressed: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """Greedy answer and its logits [length, vocabulary]; ids in `suppressed` are never chosen."""
    answer: list[int] = []
    logits: list[Tensor] = []
    for _ in range(length):
        last = reference_logits(model, family, plan, prompt, answer)[-1]
        logits.append(last)
        choice = last.clone()
        choice[list(suppressed)] = -torch.inf
        answer.append(int(choice.argmax()))
    return answer, torch.stack(logits)


Hook = Callable[..., Any]


def _hidden_input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _put_back(rows: Tensor) -> Hook:
    """A forward hook that restores `rows` ([tokens], bool) of the hidden state [..., tokens, hidden] to the input."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        before = _hidden_input(arguments, keywords)
        after = output[0] if isinstance(output, tuple) else output
        assert after.shape == before.shape and after.shape[-2] == len(rows)
        restored = torch.where(rows[:, None], before, after)
        return (restored, *output[1:]) if isinstance(output, tuple) else restored

    return hook


def _hide_vision_from_text(vision: Tensor) -> Hook:
    """A pre-hook that adds to the layer's additive mask [1, heads or 1, tokens, tokens]: no text row sees vision."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        mask = keywords["attention_mask"]
        if not vision.any() or mask is None or mask.dim() != 4:
            return None
        assert mask.is_floating_point(), mask.dtype
        hidden = ~vision[:, None] & vision[None, :]
        keywords["attention_mask"] = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        return arguments, keywords

    return hook


def _text_alone(vision: Tensor) -> Hook:
    """A forward hook for layers that mix tokens without attention: text rows as if vision tokens were not there."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        mask = keywords["attention_mask"]
        if not vision.any() or (mask is not None and mask.dim() == 4):
            return None
        hidden = _hidden_input(arguments, keywords)
        assert isinstance(output, Tensor) and hidden.dim() == 3
        others = {key: value for key, value in keywords.items() if key not in ("hidden_states", "attention_mask")}
        text = type(layer).forward(layer, hidden[:, ~vision], attention_mask=None, **others)
        return output.index_copy(1, (~vision).nonzero()[:, 0], text)

    return hook
