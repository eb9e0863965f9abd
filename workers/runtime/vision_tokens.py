"""Knowing which tokens of the running call are vision tokens: read off the call's own inputs, nothing is guessed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationMixin

from .calls import Inside, RunningCalls
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


ELSEWHERE = (
    "vision_mask was set in another thread, and a mask holds for the calls of its own thread: set vision_mask in this "
    "thread too, to None where the call's own inputs decide"
)


class _Call(threading.local):
    """Hold one thread's running calls: how deep they nest, and the token split of the outermost."""

    def __init__(self) -> None:
        self.depth = 0
        self.split: TokenSplit | None = None
        """Of the outermost call; ``None`` when it has no vision token."""
        self.known = False
        self.generation = SequenceMask(None)


class VisionTokens:
    """The split of the call that is running, shared by all frozen and bypassed layers of one applied plan.

    Calls of several threads know nothing of each other.
    """

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._call = _Call()
        self._given: WeakKeyDictionary[threading.Thread, SequenceMask] = WeakKeyDictionary()

    @property
    def mask(self) -> Tensor | None:
        """The mask given by hand in this thread, ``None`` when the calls' own inputs decide."""
        given = self._given.get(threading.current_thread())
        return None if given is None else given.mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._given[threading.current_thread()] = SequenceMask(mask)

    def _given_here(self) -> SequenceMask | None:
        """Return the mask given for this thread's calls. Raises ``RuntimeError`` when only other threads gave one."""
        if not self._given:
            return None
        given = self._given.get(threading.current_thread())
        if given is not None:
            return None if given.mask is None else given
        if any(other.mask is not None and thread.is_alive() for thread, other in list(self._given.items())):
            raise RuntimeError(ELSEWHERE)
        return None

    def split_for(
        self, hidden_states: Tensor, past: Callable[[], int], *, last_tokens: bool = False
    ) -> TokenSplit | None:
        """Return the split of ``hidden_states``, ``[..., batch, tokens, hidden]``; None when there is no vision token.

        ``past`` tells how many tokens came before them, ``last_tokens`` says that they may be the last ones of the
        call only. Raises ``RuntimeError`` when nobody said which tokens are vision.
        """
        batch, length = hidden_states.shape[-3:-1]
        given, call = self._given_here(), self._call
        if given is not None:
            return given.split(batch, length, past())
        if call.depth and call.known:
            return self._split_of_call(batch, length, last_tokens)
        if not call.depth and call.generation.mask is not None:
            return call.generation.split(batch, length, past())
        raise RuntimeError(UNKNOWN)

    def _split_of_call(self, batch: int, length: int, last_tokens: bool) -> TokenSplit | None:
        call = self._call.split
        if call is None or (call.text.batch, call.text.length) == (batch, length):
            return call
        if last_tokens and call.text.batch == batch and length < call.text.length:
            return call.of_last(length)
        raise RuntimeError(
            f"the decoder sees [batch, tokens] = {[batch, length]} but input_ids had "
            f"{[call.text.batch, call.text.length]}: vision tokens cannot be located"
        )

    # Listening to the model ---------------------------------------------------------------------------------------

    def watch(self, edits: Edits, calls: RunningCalls, stack: DecoderStack) -> None:
        """Read the inputs of every call of the model, or of an inner module that takes images too."""
        for module in dict.fromkeys(ancestors(stack.model, stack.path)):
            if isinstance(module, GenerationMixin):
                # Static caches make generation compile the model; gathered rows change their number from call to call.
                edits.set_instance_attribute(module, "_valid_auto_compile_criteria", lambda *args, **kwargs: False)
            parameters = tuple(forward_parameters(module))
            if module is stack.model or set(VISION_INPUTS).intersection(parameters):
                calls.watch(edits, module, "forward", _reading(parameters, self.enter))
        generate = getattr(stack.model, "generate", None)
        if generate is None:
            return
        # A family's own method may call the language model past our forward, so its inputs are read.
        own = getattr(type(stack.model), "generate", None) is not GenerationMixin.generate
        parameters = tuple(inspect.signature(generate).parameters)
        calls.watch(edits, stack.model, "generate", _reading(parameters, self._enter_generate) if own else None)

    def _mask_of(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids, torch.tensor(self._token_ids, device=input_ids.device))

    def enter(self, inputs: dict[str, Any]) -> Callable[[], None]:
        """Take note of a call that starts, by the names of its arguments; what is returned ends it."""
        call = self._call
        if not call.depth:
            input_ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
            with_vision = _has_vision(inputs)
            call.split = None
            # Without image inputs, placeholder ids are ordinary text; but embeddings may hold anything.
            call.known = input_ids is not None or (
                not with_vision and embeddings is not None and embeddings.shape[1] == 1
            )
            if with_vision and input_ids is not None and self._given_here() is None:
                call.split = TokenSplit.from_vision_mask(self._mask_of(input_ids))
        call.depth += 1
        return self._leave

    def _leave(self) -> None:
        self._call.depth -= 1

    def _enter_generate(self, inputs: dict[str, Any]) -> Callable[[], None]:
        ids = inputs.get("input_ids")
        if ids is not None:
            self._call.generation = SequenceMask(self._mask_of(ids) & _has_vision(inputs))
        return self._leave_generate

    def _leave_generate(self) -> None:
        self._call.generation = SequenceMask(None)


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
        """Return the split of ``length`` tokens after ``past`` ones; sequences may have been repeated, as for beams."""
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


def _reading(parameters: tuple[str, ...], enter: Callable[[dict[str, Any]], Callable[[], None]]) -> Inside:
    """Hand a call's arguments on by name."""
    return lambda args, kwargs: enter({**dict(zip(parameters, args, strict=False)), **kwargs})


def _has_vision(inputs: dict[str, Any]) -> bool:
    return any(_present(inputs.get(name)) for name in VISION_INPUTS)


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not any(v is not None for v in value.values()))
