"""Knowing which tokens of the running call are vision tokens: read off the call's own inputs, nothing is guessed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .edits import Edits
from .locate import DecoderStack, ancestors
from .token_rows import TokenSplit

VISION_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "pixel_values_global",
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


class VisionTokens:
    """The split of the call that is running, shared by all frozen and bypassed layers of one applied plan."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._depth = 0
        self._split: TokenSplit | None = None
        self._given: Tensor | None = None
        self._given_split: TokenSplit | None = None
        self._missing = ""

    @property
    def mask(self) -> Tensor | None:
        """The mask given by hand, ``None`` when the calls' own inputs decide."""
        return self._given

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._given = mask
        self._given_split = None if mask is None else TokenSplit.from_vision_mask(mask)

    def split_for(self, hidden_states: Tensor) -> TokenSplit | None:
        """The split of ``hidden_states``, ``[..., batch, tokens, hidden]``; ``None`` when they hold no vision token.

        Raises ``RuntimeError`` when nobody said which tokens are vision.
        """
        if self._given is not None:
            return self._split_by_hand(hidden_states)
        if not self._depth:
            raise RuntimeError(
                "a plan with frozen or bypassed layers needs to know the vision tokens: call the model itself, not an "
                "inner module, or set vision_mask on what apply() returned"
            )
        if self._missing:
            raise RuntimeError(self._missing)
        if self._split is not None and not self._split.matches(hidden_states):
            raise RuntimeError(
                f"the decoder sees [batch, tokens] = {list(hidden_states.shape[-3:-1])} but input_ids had "
                f"{[self._split.text.batch, self._split.text.length]}: vision tokens cannot be located"
            )
        return self._split

    def _split_by_hand(self, hidden_states: Tensor) -> TokenSplit | None:
        mask = self._given
        assert mask is not None
        if tuple(mask.shape) == tuple(hidden_states.shape[-3:-1]):
            return self._given_split
        if hidden_states.shape[-2] == 1:  # a decoding step
            return None
        raise RuntimeError(
            f"vision_mask has shape {list(mask.shape)} but the decoder sees [batch, tokens] = "
            f"{list(hidden_states.shape[-3:-1])}"
        )

    def watch(self, edits: Edits, stack: DecoderStack) -> None:
        """Read the inputs of every call of the model, or of an inner module that takes images too."""
        for module in dict.fromkeys(ancestors(stack.model, stack.path)):
            parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
            if module is not stack.model and not set(VISION_INPUTS).intersection(parameters):
                continue
            handles = (
                module.register_forward_pre_hook(_Reader(self, parameters), with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
            for handle in handles:
                edits.on_undo(handle.remove)

    def _enter(self, inputs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or self._given is not None:
            return
        self._split, self._missing = None, ""
        if not any(_present(inputs.get(name)) for name in VISION_INPUTS):
            # Without image inputs, placeholder ids would be ordinary words, and embeddings may hold anything.
            if inputs.get("inputs_embeds") is not None and inputs["inputs_embeds"].shape[1] > 1:
                self._missing = (
                    "inputs_embeds without image inputs do not say which tokens are vision: set vision_mask on what "
                    "apply() returned"
                )
            return
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            self._missing = (
                "a plan with frozen or bypassed layers needs input_ids beside the image inputs, or vision_mask set on "
                "what apply() returned"
            )
            return
        ids = torch.tensor(self._token_ids, device=input_ids.device)
        self._split = TokenSplit.from_vision_mask(torch.isin(input_ids, ids))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)


class _Reader:
    """A forward pre-hook that names a call's positional arguments."""

    def __init__(self, tokens: VisionTokens, parameters: tuple[str, ...]) -> None:
        self._tokens, self._parameters = tokens, parameters

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens._enter({**dict(zip(self._parameters, args, strict=False)), **kwargs})


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not any(v is not None for v in value.values()))
