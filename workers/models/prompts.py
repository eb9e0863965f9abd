"""Build prompts through the model's own processor, with its chat template where it has one."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, ProcessorMixin

from workers.errors import PromptError
from workers.tasks.samples import Sample
from workers.tasks.spec import TaskSpec

from .processors import special_token_in

if TYPE_CHECKING:
    from PIL.Image import Image


def prompt_text(spec: TaskSpec, sample: Sample) -> str:
    """Return what the user says about the image."""
    return spec.ask(sample.question)


def has_chat_template(processor: ProcessorMixin) -> bool:
    """Whether a loaded processor has a chat template, of its own or its tokenizer's."""
    return bool(getattr(processor, "chat_template", None))


PROMPT_DATE = datetime.date(2024, 7, 26)
"""Date in prompts of templates that write the present one; that of Llama 3.2's template where it cannot ask for it."""


_PRESENT_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def template_settings(processor: ProcessorMixin) -> dict[str, str]:
    """Let a template that writes the date write the same one every day: evaluations of different days are compared."""
    template = getattr(processor, "chat_template", None)
    if not isinstance(template, str) or not _PRESENT_DATE.search(template):
        return {}
    fixed = _PRESENT_DATE.sub(lambda found: repr(PROMPT_DATE.strftime(found[2])), template)
    return {"chat_template": fixed}


def rendered(processor: ProcessorMixin, spec: TaskSpec, sample: Sample) -> str:
    """Return the prompt as text, with one image token for the whole image."""
    if has_chat_template(processor):
        conversation = [_turn(spec, sample, {"type": "image"})]
        text: str = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False, **template_settings(processor)
        )
        return text
    return _plain_text(processor, spec, sample)


def _turn(spec: TaskSpec, sample: Sample, image: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [image, {"type": "text", "text": prompt_text(spec, sample)}]}


def _plain_text(processor: ProcessorMixin, spec: TaskSpec, sample: Sample) -> str:
    token = getattr(processor, "image_token", None) or "<image>"
    return spec.plain_prompt.format(image=token, prompt=prompt_text(spec, sample))


def stray_token(processor: ProcessorMixin, sample: Sample) -> tuple[str, str] | None:
    """Find a special token of the model in what a sample says: in which field (``question``), and what to do."""
    for field, texts in (("question", (sample.question,)), ("choices", sample.choices)):
        for text in texts:
            if token := special_token_in(processor, text):
                return field, f"holds {token!r} in its text, a special token of this model; write it in another way"
    return None


def build_inputs(
    processor: ProcessorMixin, spec: TaskSpec, samples: Sequence[Sample], images: Sequence[Image]
) -> BatchFeature:
    """Turn samples and their opened images into model inputs on the CPU, padded on the left.

    ``input_ids`` and ``attention_mask`` are ``[batch, tokens]``; the image tensors are the family's own.

    Raises:
        PromptError: a special token of the model stands in a sample's question or in one of its options.
    """
    for sample in samples:
        if stray := stray_token(processor, sample):
            raise PromptError(f"sample {sample.id}: its {stray[0]} {stray[1]}")
    padding: dict[str, Any] = {"padding": True, "padding_side": "left"}
    if has_chat_template(processor):
        conversations = [
            [_turn(spec, sample, {"type": "image", "image": image})]
            for sample, image in zip(samples, images, strict=True)
        ]
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
            **template_settings(processor),
        )
    texts = [_plain_text(processor, spec, sample) for sample in samples]
    return processor(text=texts, images=[[image] for image in images], return_tensors="pt", **padding)


def to_device(inputs: BatchFeature, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Move tensors to the device, floating-point ones (pixels) to the model's dtype."""
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
        moved[name] = value
    return moved
