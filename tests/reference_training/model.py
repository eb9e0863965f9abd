"""The reference architectures: genuine Hugging Face LLaVAs, a CLIP vision tower and a language backbone, made small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from reference_training.tokenizer import IMAGE, LONGEST_TEXT
from workers.reference.smollm2 import VisionArchitecture, vision_config


@dataclass(frozen=True)
class Architecture(VisionArchitecture):
    """Sizes of the two transformers; the defaults are the shipped model's."""

    backbone: type[PretrainedConfig] = LlamaConfig
    text_width: int = 192
    text_layers: int = 12
    text_heads: int = 6
    text_key_value_heads: int | None = None
    """As many as heads where absent."""
    text_inner: int = 512


CAPTIONER = Architecture(
    backbone=Qwen2Config, text_width=128, text_layers=16, text_heads=4, text_key_value_heads=2, text_inner=384
)
"""Another family, deeper and narrower than the shipped model: what claims about criteria are tried on last."""


def build_model(
    tokenizer: PreTrainedTokenizerFast, architecture: Architecture, seed: int
) -> LlavaForConditionalGeneration:
    """A randomly initialised float32 model; the same seed gives the same weights."""
    text_config = architecture.backbone(
        vocab_size=len(tokenizer),
        hidden_size=architecture.text_width,
        intermediate_size=architecture.text_inner,
        num_hidden_layers=architecture.text_layers,
        num_attention_heads=architecture.text_heads,
        num_key_value_heads=architecture.text_key_value_heads or architecture.text_heads,
        max_position_embeddings=LONGEST_TEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision_config(architecture),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=architecture.vision_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    return model
