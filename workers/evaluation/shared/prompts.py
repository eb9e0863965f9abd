"""Read the prompts of a split as token embeddings, one group per image; their common beginning is held once.

The vision tower, the projector and the placement of their features are the model's own: one call per image, stopped
before the first decoder layer, gives the embeddings of the first question's prompt. The other questions share its
beginning up to where their tokens part, and add tokens, which the embedding table gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from workers.device.memory import OUT_OF_MEMORY, is_out_of_memory
from workers.errors import ImageError, PromptError
from workers.layerwise.decoder import OWNER_ARGUMENTS, Decoder, NotExactError
from workers.models.inputs import refused, too_long
from workers.models.loading import LoadedModel
from workers.models.prompts import build_inputs, to_device
from workers.runtime.locate import forward_parameters
from workers.runtime.vision_tokens import VISION_INPUTS
from workers.tasks import Sample, Task


@dataclass(frozen=True)
class ImagePrompts:
    """The prompts about one image.

    ``prefix`` is ``[tokens, hidden]``, what all prompts begin with; ``vision`` (bool ``[tokens]``) marks its vision
    tokens; ``positions`` is ``[..., tokens]`` and ``next_position`` ``[..., 1]`` the position after it, with leading
    dimensions where rotary positions have several axes; ``pattern`` (bool ``[tokens, tokens]``) says which of the
    prefix's tokens see which. ``questions`` holds the token ids that follow, per sample.
    """

    samples: tuple[int, ...]
    """Places in the split."""
    prefix: Tensor
    vision: Tensor
    positions: Tensor
    next_position: Tensor
    pattern: Tensor
    questions: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.nbytes for t in (self.prefix, self.vision, self.positions, self.pattern))


class PromptReader:
    """Read samples into :class:`ImagePrompts`."""

    def __init__(self, loaded: LoadedModel, task: Task, decoder: Decoder) -> None:
        self._loaded, self._task, self._decoder = loaded, task, decoder

    def read(self, samples: Sequence[tuple[int, Sample]], failed: dict[str, str]) -> list[ImagePrompts]:
        """Group samples (with their indices) by image; one that cannot be opened or processed goes to ``failed``.

        Raises:
            NotExactError: the prompts cannot be shared.
        """
        groups = []
        for _, members in groupby(samples, key=lambda pair: pair[1].image_key):
            together = list(members)
            try:
                image = together[0][1].image.open()
            except ImageError as error:
                failed.update({sample.id: str(error) for _, sample in together})
                continue
            groups += self._groups(together, image, failed)
        return groups

    def _groups(self, members: Sequence[tuple[int, Sample]], image: Any, failed: dict[str, str]) -> list[ImagePrompts]:
        """Read the prompts about one image together; where that fails, each by itself, to see which one fails."""
        try:
            return [self._group(members, image)]
        except NotExactError:
            raise
        except Exception as error:  # processors raise all kinds, and none names the sample
            if len(members) == 1:
                memory = is_out_of_memory(error)
                failed[members[0][1].id] = OUT_OF_MEMORY if memory else refused(error)
                return []
        return [group for member in members for group in self._groups([member], image, failed)]

    def _group(self, members: Sequence[tuple[int, Sample]], image: Any) -> ImagePrompts:
        spec, processor = self._task.spec, self._loaded.processor
        samples = [sample for _, sample in members]
        alone = build_inputs(processor, spec, samples[:1], [image])
        prompts = [_first_row(alone)]
        if len(samples) > 1:
            batch = build_inputs(processor, spec, samples, [image] * len(samples))
            kept = batch["attention_mask"].bool()
            prompts = [row[mask].tolist() for row, mask in zip(batch["input_ids"], kept, strict=True)]
            if prompts[0] != _first_row(alone):
                raise NotExactError("its processor gives one prompt other tokens beside other prompts")
        for prompt in prompts:
            if reason := too_long(self._loaded.model.config, len(prompt), spec.answer.max_new_tokens):
                raise PromptError(reason)
        inputs = to_device(alone, self._loaded.device, self._loaded.model.dtype)
        return shared_prompts(self._decoder, inputs, prompts, tuple(index for index, _ in members))


def shared_prompts(
    decoder: Decoder,
    inputs: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    indices: tuple[int, ...],
    *,
    shared: int | None = None,
) -> ImagePrompts:
    """Find what ``prompts`` (token ids) about one image share; ``inputs`` are the model's inputs for the first of them.

    ``shared`` is the number of tokens of the prefix, where it is not to be found.

    Raises:
        NotExactError: they cannot be packed.
    """
    settings: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in forward_parameters(decoder.model):
        settings["logits_to_keep"] = 1
    recording = decoder.record(lambda: decoder.model(**inputs, **settings))
    _require_known(recording.owner)
    ids = torch.tensor(prompts[0])
    vision = torch.isin(ids, torch.tensor(decoder.descriptor.vision_token_ids))
    if not any(name in inputs for name in VISION_INPUTS):
        vision = torch.zeros_like(vision)
    if shared is None:
        shared = _common_length(prompts)
        if len(prompts) == 1 and bool(vision.any()):
            shared = int(vision.nonzero().max()) + 1
        shared = min(shared, len(ids) - 1)
    if bool(vision[shared:].any()):
        raise NotExactError("questions stand before the image in its prompts, so they share no image")
    embeddings = recording.owner["inputs_embeds"][0]
    if not torch.equal(embeddings[shared:], decoder.embed(ids[shared:].to(embeddings.device))):
        raise NotExactError("its tokens are not embedded by the table alone")
    positions = recording.owner.get("position_ids")
    if positions is None:
        positions = torch.arange(len(ids), device=embeddings.device)[None]
    return ImagePrompts(
        samples=indices,
        prefix=embeddings[:shared].clone(),
        vision=vision[:shared].to(embeddings.device),
        positions=positions[..., 0, :shared].clone(),
        next_position=positions[..., 0, shared : shared + 1].clone(),
        pattern=_pattern(decoder, recording.layers, shared, len(ids)),
        questions=tuple(tuple(prompt[shared:]) for prompt in prompts),
    )


def text_prompt(decoder: Decoder, tokens: Sequence[int], index: int) -> ImagePrompts:
    """Read a text without an image: no prefix, and the first of the ``tokens`` as the question.

    Raises:
        NotExactError: it cannot be packed.
    """
    ids = torch.tensor([tokens], device=decoder.model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return replace(shared_prompts(decoder, inputs, [tokens], (index,), shared=0), questions=((tokens[0],),))


def _pattern(decoder: Decoder, layers: Sequence[dict[str, Any]], shared: int, length: int) -> Tensor:
    """Which tokens of the prefix see which, as the model says; later tokens must see all before them."""
    causal = torch.ones(length, length, dtype=torch.bool, device=decoder.model.device).tril()
    seen = causal
    for number, kind in enumerate(decoder.kinds):
        if kind == "full_attention":
            seen = _seen(layers[number].get(decoder.mask_name), causal)
            break
    if not torch.equal(seen[shared:], causal[shared:]):
        raise NotExactError("tokens of its prompts do not see exactly what is before them")
    return seen[:shared, :shared].clone()


def _first_row(inputs: Any) -> list[int]:
    row: list[int] = inputs["input_ids"][0].tolist()
    return row


def _seen(mask: Any, causal: Tensor) -> Tensor:
    """Return a layer's mask ``[1, 1, tokens, tokens]`` as bool ``[tokens, tokens]``; without one it is causal."""
    if mask is None:
        return causal
    if not isinstance(mask, Tensor) or mask.shape != (1, 1, *causal.shape):
        raise NotExactError("its masks are not [batch, 1, tokens, tokens]")
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0


def _require_known(owner: dict[str, Any]) -> None:
    for name, value in owner.items():
        if name not in OWNER_ARGUMENTS and (isinstance(value, Tensor | list | tuple | dict) and len(value) > 0):
            raise NotExactError(f"its decoder is given {name} beside the prompt's embeddings")


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    for index in range(shortest):
        if any(prompt[index] != first[index] for prompt in prompts):
            return index
    return shortest
