"""Open the images of samples and process both into model inputs; list those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature

from workers.errors import ImageError, PromptError
from workers.tasks import Sample, Task
from workers.text import describe_error

from .loading import LoadedModel
from .prompts import build_inputs

UNSCALED = ("linear", "dynamic")
"""Kinds of rotary scaling beside which ``max_position_embeddings`` is that of before the scaling."""


@dataclass(frozen=True)
class PreparedBatch:
    """Samples whose images could be opened, their model inputs on the CPU, and why the others failed."""

    samples: tuple[Sample, ...]
    inputs: BatchFeature | None
    failed: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the input tensors."""
        tensors = () if self.inputs is None else self.inputs.values()
        return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def prepare_batch(loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> PreparedBatch:
    """Open images and build inputs; samples that cannot be opened, are refused or too long are failed."""
    opened, images = [], []
    failed: dict[str, str] = {}
    for sample in samples:
        try:
            images.append(sample.image.open())
            opened.append(sample)
        except ImageError as error:
            failed[sample.id] = str(error)
    try:
        inputs = build_inputs(loaded.processor, task.spec, opened, images) if opened else None
    except Exception as error:  # processors raise all kinds, and none names the sample
        if len(opened) == 1:
            return PreparedBatch((), None, failed | {opened[0].id: refused(error)})
        alone = {sample.id: prepare_batch(loaded, task, [sample]).failed for sample in opened}
        for reasons in alone.values():
            failed |= reasons
        usable = [sample for sample in opened if not alone[sample.id]]
        if len(usable) == len(opened):
            raise  # each by itself is fine, so that it is no sample's fault
        return replace(prepare_batch(loaded, task, usable), failed=failed)
    if inputs is not None:
        lengths = inputs["attention_mask"].sum(-1).tolist()
        long = {
            sample.id: reason
            for sample, tokens in zip(opened, lengths, strict=True)
            if (reason := too_long(loaded.model.config, tokens, task.spec.answer.max_new_tokens))
        }
        if long:
            rest = prepare_batch(loaded, task, [sample for sample in opened if sample.id not in long])
            return replace(rest, failed=failed | long)
    return PreparedBatch(tuple(opened), inputs, failed)


def too_long(config: Any, prompt_tokens: int, new_tokens: int) -> str:
    """Word why a prompt and its answer do not fit into the model's positions; empty where they do.

    The limit is read as engines read it (vLLM, ``_get_and_verify_max_len``): rotary scalings that leave
    ``max_position_embeddings`` as it was before them multiply it by their factor.
    """
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if not longest:
        return ""
    rotary = getattr(text, "rope_parameters", None) or {}
    for each in rotary.values() if all(isinstance(value, dict) for value in rotary.values()) else (rotary,):
        if each.get("rope_type") in UNSCALED and "gemma3" not in text.model_type:
            longest = max(longest, int(longest * (each.get("factor") or 1.0)))
    if prompt_tokens + new_tokens <= longest:
        return ""
    return (
        f"its prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit into the model's {longest} "
        "positions; shorten the prompt, or max_new_tokens"
    )


def refused(error: Exception) -> str:
    """Word the reason of a sample that the processor refuses, or that cannot be asked."""
    if isinstance(error, PromptError):
        return str(error)
    return f"the model's processor refuses it: {describe_error(error)}"
