"""Families whose decoder layers are not all alike and lean on each other: shared keys, layers of cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma4Config,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from .patch_grids import BOTH, FOUR, PATCH, modality_types
from .picture_towers import LANGUAGE_MODEL, TOWER, stacked, text
from .tiny import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    RELOAD,
    TEXT_BESIDE_PICTURES,
    VIDEO,
    VOCABULARY,
    Family,
    Seeds,
    everywhere,
    flat,
    pixels,
    sliced,
)

GEMMA3N_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
GEMMA3N_WIDTHS = [48, 48, 48, 48, 40, 40, 40, 40]
GEMMA3N_SPARSITY = [0.8, 0.8, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
GEMMA4_TYPES = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * 2 + ["full_attention"] * 2

KV_PROVIDERS_3N = {2: "S", 4: "S"}  # the last layer of each kind before the sharing ones


def gemma3n_text(**changes: Any) -> dict[str, Any]:
    return text(
        "gemma3n_text",
        num_hidden_layers=8,
        intermediate_size=GEMMA3N_WIDTHS,
        tie_word_embeddings=True,
        sliding_window=6,
        layer_types=GEMMA3N_TYPES,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=3,
        num_kv_shared_layers=3,
        activation_sparsity_pattern=GEMMA3N_SPARSITY,
        **changes,
    )


def _gemma3n() -> Gemma3nConfig:
    return Gemma3nConfig(
        text_config=gemma3n_text(),
        vision_config={"hidden_size": 16, "vocab_size": 6, "vocab_offset": IMAGE, "label_names": ["none"]},
        audio_config={
            "vocab_size": 3,
            "vocab_offset": IMAGE + 6,
            "input_feat_size": 16,
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (8, 4),
        },
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=4,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
        image_token_id=IMAGE,
        boa_token_id=94,
        eoa_token_id=95,
        audio_token_id=IMAGE + 6,
        tie_word_embeddings=True,
    )


def _build_gemma3n(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """Its own tower needs the timm package; a SigLIP tower of the same output width stands in its place."""
    tower = SiglipVisionConfig(**TOWER, vision_use_head=False, vocab_size=6, vocab_offset=IMAGE, rms_norm_eps=1e-6)
    vars(config)["vision_config"] = tower  # past the config's check of its type
    return Gemma3nForConditionalGeneration._from_config(config, attn_implementation=attention)


def positioned_patches(seeds: Seeds) -> dict[str, Tensor]:
    """Gemma 4: pixel_values [pictures, 16, 3 * patch * patch] and the patches' places in the picture."""
    count = len(flat(seeds))
    places = torch.tensor([[column, row] for row in range(4) for column in range(4)])
    return {
        "pixel_values": torch.stack([pixels(seed, 16, 3 * PATCH * PATCH).sigmoid() for seed in flat(seeds)]),
        "image_position_ids": places.expand(count, 16, 2).clone(),
    }


def gemma4_config(**changes: Any) -> Gemma4Config:
    settings: dict[str, Any] = {
        "num_hidden_layers": 8,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "layer_types": GEMMA4_TYPES,
        "global_head_dim": 16,
        "num_kv_shared_layers": 3,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    }
    return Gemma4Config(
        text_config=text("gemma4_text", **{**settings, **changes}),
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        audio_config=None,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boa_token_id=94,
        eoa_token_index=95,
        audio_token_id=96,
        tie_word_embeddings=True,
    )


def tiles(seeds: Seeds) -> dict[str, Tensor]:
    """mllama: pixel_values [batch, 2 pictures, 2 tiles, 3, side, side]; absent pictures are zeros with ratio id 0."""
    most = 2
    absent = torch.zeros(2, 3, 8, 8)
    values = [torch.stack([pixels(seed, 2, 3, 8, 8) for seed in row] + [absent] * (most - len(row))) for row in seeds]
    present = torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in seeds])
    tile_mask = torch.stack([torch.ones_like(present), present], dim=-1)
    return {"pixel_values": torch.stack(values), "aspect_ratio_ids": 2 * present, "aspect_ratio_mask": tile_mask}


def cross_attention(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    """mllama: [tokens, 2 pictures, 2 tiles]; a token sees the last picture before it, none before the first."""
    number = (ids == IMAGE).cumsum(0)
    seen = torch.stack([number == 1, number == 2], dim=-1).long()
    return {"cross_attention_mask": seen[:, :, None].expand(-1, -1, 2).clone()}


def _mllama() -> MllamaConfig:
    text_config = text("mllama_text_model", num_hidden_layers=8, cross_attention_layers=[2, 5])
    return MllamaConfig(
        text_config={key: value for key, value in text_config.items() if key != "head_dim"},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=IMAGE,
    )


def gemma3n_lists(kept: tuple[int, ...]) -> dict[str, object]:
    """The last three layers share keys and values; the count becomes that of the kept ones among them."""
    per_layer = sliced(
        layer_types=GEMMA3N_TYPES, intermediate_size=GEMMA3N_WIDTHS, activation_sparsity_pattern=GEMMA3N_SPARSITY
    )
    return {**per_layer(kept), "num_kv_shared_layers": sum(layer >= 5 for layer in kept)}


def _gemma4_lists(kept: tuple[int, ...]) -> dict[str, object]:
    return {**sliced(layer_types=GEMMA4_TYPES)(kept), "num_kv_shared_layers": sum(layer >= 5 for layer in kept)}


def _mllama_lists(kept: tuple[int, ...]) -> dict[str, object]:
    return {"cross_attention_layers": [new for new, old in enumerate(kept) if old in (2, 5)]}


def _self_attention_first(plan: str) -> bool:
    """mllama: text-only prompts take the sequence length from the cache of the first layer."""
    kept = [layer for layer, letter in enumerate(plan) if letter != "S"]
    return bool(kept) and kept[0] not in (2, 5)


FAMILIES = (
    Family(
        "gemma3n",
        _gemma3n,
        LANGUAGE_MODEL,
        8,
        stacked,
        FOUR,
        build=_build_gemma3n,
        refused=KV_PROVIDERS_3N,
        may_refuse=everywhere("B", range(8)),
        saved_lists=gemma3n_lists,
        traps={RELOAD: "the vision config needs the timm package"},
    ),
    Family(
        "gemma4",
        gemma4_config,
        LANGUAGE_MODEL,
        8,
        positioned_patches,
        FOUR,
        BOTH,
        modality_types,
        refused={3: "S", 4: "S"},
        # Vision keys of a provider are read by its consumers; the last layer is made full attention on reload.
        may_refuse={3: "B", 4: "B", 5: "B", 6: "B", 7: "BS"},
        saved_lists=_gemma4_lists,
        savable=lambda plan: plan[6:] != "SS",
    ),
    Family(
        "mllama",
        _mllama,
        LANGUAGE_MODEL,
        8,
        tiles,
        (IMAGE,),
        frozenset(),
        cross_attention,
        refused=everywhere("FB", range(8)),
        refused_plans=("SSRRRRRR", "SSSSSRRR"),
        possible=_self_attention_first,
        saved_lists=_mllama_lists,
        traps={TEXT_BESIDE_PICTURES: "a batch with any picture runs the cross-attention layers for all its prompts"},
    ),
)
