"""Knowing which tokens of the running call are vision tokens: read off the call's own inputs, nothing is guessed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin

from .edits import Edits
from .locate import DecoderStack, ancestors, forward_parameters
from .token_rows import TokenSplit

VISION_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "pixel_values_global",
    "pixel_values_local",
    "image_embeds",
    "image_embeddings",
    "image_features",
    "image_patches",
    "images",
    "mm_encoder_outputs",
    "pixel_attention_values",
    "video_embeds",
    "image_hidden_states",
    "high_res_pixel_values",
)
"""Arguments whose presence says that placeholders stand for image or video features."""

UNKNOWN = (
    "a plan with frozen or bypassed layers needs to know the vision tokens: pass input_ids beside the image inputs to "
    "the model itself, not to an inner module, or set vision_mask on what apply() returned"
)


class VisionTokens:
    """The split of the call that is running, shared by all frozen and bypassed layers of one applied plan."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._depth = 0
        self._call: TokenSplit | None = None
        self._known = False
        self._given = SequenceMask(None)
        self._generation = SequenceMask(None)

    @property
    def mask(self) -> Tensor | None:
        """The mask given by hand, ``None`` when the calls' own inputs decide."""
        return self._given.mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._given = SequenceMask(mask)

    def split_for(
        self, hidden_states: Tensor, past: Callable[[], int], *, last_tokens: bool = False
    ) -> TokenSplit | None:
        """The split of ``hidden_states``, ``[..., batch, tokens, hidden]``; ``None`` when they hold no vision token.

        ``past`` tells how many tokens came before them, ``last_tokens`` says that they may be the last ones of the
        call only. Raises ``RuntimeError`` when nobody said which tokens are vision.
        """
        batch, length = hidden_states.shape[-3:-1]
        if self._given.mask is not None:
            return self._given.split(batch, length, past())
        if self._depth and self._known:
            return self._split_of_call(batch, length, last_tokens)
        if not self._depth and self._generation.mask is not None:
            return self._generation.split(batch, length, past())
        raise RuntimeError(UNKNOWN)

    def _split_of_call(self, batch: int, length: int, last_tokens: bool) -> TokenSplit | None:
        call = self._call
        if call is None or (call.text.batch, call.text.length) == (batch, length):
            return call
        if last_tokens and call.text.batch == batch and length < call.text.length:
            return call.of_last(length)
        raise RuntimeError(
            f"the decoder sees [batch, tokens] = {[batch, length]} but input_ids had "
            f"{[call.text.batch, call.text.length]}: vision tokens cannot be located"
        )

    # Listening to the model ---------------------------------------------------------------------------------------

    def watch(self, edits: Edits, stack: DecoderStack) -> None:
        """Read the inputs of every call of the model, or of an inner module that takes images too."""
        for module in dict.fromkeys(ancestors(stack.model, stack.path)):
            if isinstance(module, GenerationMixin):
                # Static caches make generation compile the model; gathered rows change their number from call to call.
                edits.set_instance_attribute(module, "_valid_auto_compile_criteria", lambda *args, **kwargs: False)
            parameters = tuple(forward_parameters(module))
            if module is not stack.model and not set(VISION_INPUTS).intersection(parameters):
                continue
            handles = (
                module.register_forward_pre_hook(_Reader(self, parameters), with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
            for handle in handles:
                edits.on_undo(handle.remove)
        self._watch_generate(edits, stack.model)

    def _watch_generate(self, edits: Edits, model: nn.Module) -> None:
        """Read the inputs of a family's own ``generate``, which may call the language model past our forward."""
        generate = getattr(model, "generate", None)
        if generate is None or getattr(type(model), "generate", None) is GenerationMixin.generate:
            return
        parameters = tuple(inspect.signature(generate).parameters)

        @wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            inputs = {**dict(zip(parameters, args, strict=False)), **kwargs}
            ids = inputs.get("input_ids")
            if ids is not None:
                self._generation = SequenceMask(self._mask_of(ids) & _has_vision(inputs))
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation = SequenceMask(None)

        edits.set_instance_attribute(model, "generate", watched)

    def _mask_of(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids, torch.tensor(self._token_ids, device=input_ids.device))

    def enter(self, inputs: dict[str, Any]) -> None:
        """Take note of a call that starts, by the names of its arguments."""
        self._depth += 1
        if self._depth > 1 or self._given.mask is not None:
            return
        input_ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        with_vision = _has_vision(inputs)
        self._call = None
        # Without image inputs, placeholder ids are ordinary text; but embeddings may hold anything.
        self._known = input_ids is not None or (not with_vision and embeddings is not None and embeddings.shape[1] == 1)
        if with_vision and input_ids is not None:
            self._call = TokenSplit.from_vision_mask(self._mask_of(input_ids))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)


def takes_vision(stack: DecoderStack) -> bool:
    """Whether the model, or a module on the way to its decoder, takes image inputs by a name known here."""
    return any(
        set(VISION_INPUTS).intersection(forward_parameters(module)) for module in ancestors(stack.model, stack.path)
    )


class SequenceMask:
    """Vision tokens of whole sequences, bool ``[batch, tokens]``; what comes after them is text."""

    def __init__(self, mask: Tensor | None) -> None:
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"a vision mask has shape [batch, tokens], got {list(mask.shape)}")
        self.mask = mask
        self._splits: dict[tuple[int, int, int], TokenSplit | None] = {}

    def split(self, batch: int, length: int, past: int) -> TokenSplit | None:
        """The split of ``length`` tokens after ``past`` ones; sequences may have been repeated, as for beams."""
        assert self.mask is not None
        if past >= self.mask.shape[1]:
            return None
        if batch % self.mask.shape[0]:
            raise RuntimeError(f"the vision mask is for {self.mask.shape[0]} sequences, the decoder sees {batch}")
        key = (batch, length, past)
        if key not in self._splits:
            part = self.mask[:, past : past + length]
            part = functional.pad(part, (0, length - part.shape[1]))
            repeated = part.repeat_interleave(batch // part.shape[0], dim=0)
            self._splits = {key: TokenSplit.from_vision_mask(repeated)}
        return self._splits[key]


class _Reader:
    """A forward pre-hook that names a call's positional arguments."""

    def __init__(self, tokens: VisionTokens, parameters: tuple[str, ...]) -> None:
        self._tokens, self._parameters = tokens, parameters

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens.enter({**dict(zip(self._parameters, args, strict=False)), **kwargs})


def _has_vision(inputs: dict[str, Any]) -> bool:
    return any(_present(inputs.get(name)) for name in VISION_INPUTS)


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not any(v is not None for v in value.values()))
