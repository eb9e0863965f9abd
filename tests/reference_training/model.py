"""The reference architectures: genuine Hugging Face LLaVAs, a CLIP vision tower and a language backbone, made small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerFast,
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
    text_settings: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the backbone's configuration, where the family's own defaults do not fit a small model."""
    scaled_norms: bool = False
    """Whether the norms before attention and MLP of layer l start at 1 / sqrt(l) (Sun et al. 2025, 2502.05795)."""


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
        **architecture.text_settings,
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
    if architecture.scaled_norms:
        scale_norms(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    return model


@torch.no_grad()
def scale_norms(model: LlavaForConditionalGeneration) -> None:
    """Layer-norm scaling, its factor 1 / sqrt(l) written into the gains of layer l's norms (l counts from 1)."""
    for number, layer in enumerate(model.model.language_model.layers, start=1):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(number**-0.5)
