"""Families whose pictures arrive as grids of patches (Qwen-VL and its like), as tiles (mllama), or with two towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Lfm2VlConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from .picture_towers import LANGUAGE_MODEL, TOWER, text
from .tiny import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    Family,
    Seeds,
    everywhere,
    flat,
    keeps_one_of,
    mixers,
    pixels,
    sliced,
)

PATCH = 2
GRID_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
START_END: dict[str, Any] = {"vision_start_token_id": IMAGE_START, "vision_end_token_id": IMAGE_END}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

QWEN3_5_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
LFM2_TYPES = ["conv", "conv", "full_attention", "conv", "full_attention", "conv", "full_attention", "conv"]


def patch_grid(seeds: Seeds) -> dict[str, Tensor]:
    """A picture of 4 x 6 patches: pixel_values [all patches, 3 * 2 * patch * patch], merged 2 x 2 into 6 tokens."""
    count = len(flat(seeds))
    patches = [pixels(seed, 4 * 6, 3 * 2 * PATCH * PATCH) for seed in flat(seeds)]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor([[1, 4, 6]] * count)}


def modality_types(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    """0 text, 1 picture, 2 video: what the processors return for multimodal rotary positions."""
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def grid_tower(**changes: Any) -> dict[str, Any]:
    settings = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return settings | changes


def _qwen2_vl() -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config=text("qwen2_vl_text", rope_parameters=MROPE),
        vision_config=grid_tower(embed_dim=16, mlp_ratio=2),
        **GRID_IDS,
        **START_END,
    )


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=text("qwen2_5_vl_text", rope_parameters=MROPE),
        vision_config=grid_tower(
            hidden_size=16, intermediate_size=24, out_hidden_size=32, fullatt_block_indexes=[1], window_size=8
        ),
        **GRID_IDS,
        **START_END,
    )


def deepstack_tower(**changes: Any) -> dict[str, Any]:
    return grid_tower(
        **{
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            **changes,
        }
    )


def _qwen3_vl() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=text("qwen3_vl_text", rope_parameters={**MROPE, "mrope_interleaved": True}),
        vision_config=deepstack_tower(),
        **GRID_IDS,
        **START_END,
    )


def _qwen3_vl_moe() -> Qwen3VLMoeConfig:
    return Qwen3VLMoeConfig(
        text_config=text(
            "qwen3_vl_moe_text",
            rope_parameters={**MROPE, "mrope_interleaved": True},
            num_hidden_layers=8,
            num_local_experts=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            decoder_sparse_step=2,
            mlp_only_layers=[5],
        ),
        vision_config=deepstack_tower(),
        **GRID_IDS,
        **START_END,
    )


def _qwen3_5() -> Qwen3_5Config:
    return Qwen3_5Config(
        text_config=text(
            "qwen3_5_text",
            num_hidden_layers=8,
            layer_types=QWEN3_5_TYPES,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        ),
        vision_config=deepstack_tower(),
        **GRID_IDS,
        **START_END,
    )


def _glm4v() -> Glm4vConfig:
    return Glm4vConfig(
        text_config=text("glm4v_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        vision_config=grid_tower(hidden_size=16, intermediate_size=24, out_hidden_size=32, image_size=8),
        **GRID_IDS,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=94,
        video_end_token_id=95,
    )


def naflex(seeds: Seeds) -> dict[str, Tensor]:
    """SigLIP 2 patches in a square of 4 x 4: pixel_values [pictures, 16, 3 * patch * patch]."""
    count = len(flat(seeds))
    return {
        "pixel_values": torch.stack([pixels(seed, 16, 3 * PATCH * PATCH) for seed in flat(seeds)]),
        "spatial_shapes": torch.tensor([[4, 4]] * count),
        "pixel_attention_mask": torch.ones(count, 16, dtype=torch.long),
    }


def _lfm2_vl() -> Lfm2VlConfig:
    text_config = text(
        "lfm2",
        num_hidden_layers=8,
        tie_word_embeddings=True,
        layer_types=LFM2_TYPES,
        block_auto_adjust_ff_dim=False,
    )
    return Lfm2VlConfig(
        text_config={key: value for key, value in text_config.items() if key != "head_dim"},
        vision_config={
            "model_type": "siglip2_vision_model",
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "patch_size": PATCH,
            "num_patches": 16,
            "vision_use_head": False,
        },
        image_token_id=IMAGE,
        projector_hidden_size=24,
        downsample_factor=2,
        tie_word_embeddings=True,
    )


SIX = (IMAGE_START, *(IMAGE,) * 6, IMAGE_END)
FOUR = (IMAGE_START, *(IMAGE,) * 4, IMAGE_END)
BOTH = frozenset({IMAGE, VIDEO})


DEEPSTACK = {0: "S", 1: "S"}  # two levels of vision features are added behind list positions 0 and 1

FAMILIES = (
    Family("qwen2_vl", _qwen2_vl, LANGUAGE_MODEL, 7, patch_grid, SIX, BOTH, modality_types),
    Family("qwen2_5_vl", _qwen2_5_vl, LANGUAGE_MODEL, 7, patch_grid, SIX, BOTH, modality_types),
    Family("qwen3_vl", _qwen3_vl, LANGUAGE_MODEL, 7, patch_grid, SIX, BOTH, modality_types, refused=DEEPSTACK),
    Family("qwen3_vl_moe", _qwen3_vl_moe, LANGUAGE_MODEL, 8, patch_grid, SIX, BOTH, modality_types, refused=DEEPSTACK),
    Family(
        "qwen3_5",
        _qwen3_5,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        modality_types,
        may_refuse=everywhere("FB", mixers(QWEN3_5_TYPES)),
        refused_plans=("RRRSRRRS", "SSSSSSSS", "SRSSRRRS"),
        possible=keeps_one_of(3, 7),
        saved_lists=sliced(layer_types=QWEN3_5_TYPES),
        # Its gated norm divides by the size of a head's output, which can be near zero, and so magnifies rounding.
        tolerance=3e-4,
    ),
    Family("glm4v", _glm4v, LANGUAGE_MODEL, 7, patch_grid, SIX, BOTH, modality_types),
    Family(
        "lfm2_vl",
        _lfm2_vl,
        LANGUAGE_MODEL,
        8,
        naflex,
        FOUR,
        may_refuse=everywhere("FB", mixers(LFM2_TYPES)),
        refused_plans=("RRSRSRSR", "SRSRSRSS"),
        possible=keeps_one_of(2, 4, 6),
        saved_lists=sliced(layer_types=LFM2_TYPES),
    ),
)
