"""Load processors, complete them where a checkpoint leaves something out, and find what they cannot take."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from workers.errors import ModelError
from workers.messages import ModelSource
from workers.text import first_line

from .without_torchvision import load_auto_processor, torchvision_problem

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "pixtral": 0}
"""Tokens that a vision tower adds to those of its patches."""


def load_processor(directory: Path | str, source: ModelSource, config: Any) -> ProcessorMixin:
    """Load the processor at a directory or hub id, ready for batches that are padded on the left.

    Raises:
        ModelError: it cannot be loaded, does not take images and text, or lacks what the configuration cannot tell.
    """
    try:
        processor = load_auto_processor(directory, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # processors of any family raise all kinds here
        lacking = torchvision_problem() if "torchvision" in str(error).lower() else ""
        advice = f"; torchvision: {lacking}; install the build that fits torch's" if lacking else ""
        raise ModelError(f"model {source.path}: its processor cannot be loaded: {first_line(error)}{advice}") from None
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"model {source.path}: its processor does not take both images and text")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"model {source.path}: its tokenizer has neither a padding nor an end token")
        # Padding is masked out, so which token stands there does not matter.
        tokenizer.pad_token = tokenizer.eos_token
    processor.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if getattr(processor, "patch_size", 0) is None:
        _fill_patches(processor, source, config)
    typed: ProcessorMixin = processor
    return typed


def _fill_patches(processor: Any, source: ModelSource, config: Any) -> None:
    """Take from the model's configuration what counts an image's tokens, as transformers advises for old checkpoints.

    Raises:
        ModelError: the configuration does not tell.
    """
    vision: Any = getattr(config, "vision_config", None)
    extra = _CLASS_TOKENS.get(getattr(vision, "model_type", ""))
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if extra is None or strategy is None or not isinstance(getattr(vision, "patch_size", None), int):
        raise ModelError(
            f"model {source.path}: its processor_config.json has no patch_size; write patch_size, "
            "vision_feature_select_strategy and num_additional_image_tokens into it, as of the model's vision tower"
        )
    processor.patch_size, processor.vision_feature_select_strategy = vision.patch_size, strategy
    processor.num_additional_image_tokens = extra


def special_token_in(processor: ProcessorMixin, text: str) -> str | None:
    """Return the first special token of the model that stands in a text, None where there is none.

    It would be read as what it stands for: another image, the end of the answer, the turn of another speaker.
    """
    found = _special_tokens(processor).search(text)
    return found.group() if found else None


@lru_cache(maxsize=4)
def _special_tokens(processor: Any) -> re.Pattern[str]:
    tokens = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    marked = sorted((token for token in tokens if not token.replace(" ", "").isalnum()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, filter(str.strip, marked))) or r"(?!)")
