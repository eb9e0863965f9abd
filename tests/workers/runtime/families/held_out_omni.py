"""Families that also hear, and others with further inputs beside pictures and text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    MiniCPMV4_6Config,
    PreTrainedConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen3OmniMoeThinkerConfig,
)

from .patch_grids import (
    BOTH,
    DEEPSTACK,
    GRID_IDS,
    MROPE,
    PATCH,
    QWEN3_5_TYPES,
    SIX,
    deepstack_tower,
    grid_tower,
    modality_types,
    patch_grid,
)
from .picture_towers import LANGUAGE_MODEL, TEXT, TOWER, text
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
    since,
    sliced,
)

AUDIO: dict[str, Any] = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "output_dim": 32,
    "max_source_positions": 32,
}
OMNI_IDS: dict[str, Any] = {"audio_start_token_id": 97, "audio_end_token_id": 98}


def _qwen2_5_omni() -> PreTrainedConfig:
    return Qwen2_5OmniThinkerConfig(
        text_config=text("qwen2_5_omni_text", rope_parameters=MROPE),
        vision_config=grid_tower(
            hidden_size=16, intermediate_size=24, out_hidden_size=32, fullatt_block_indexes=[1], window_size=8
        ),
        audio_config=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=96,
        vision_start_token_id=IMAGE_START,
        **OMNI_IDS,
    )


def _qwen3_omni_moe() -> PreTrainedConfig:
    return Qwen3OmniMoeThinkerConfig(
        text_config=text(
            "qwen3_omni_moe_text",
            rope_parameters={**MROPE, "mrope_interleaved": True},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        vision_config=deepstack_tower(),
        audio_config={**AUDIO, "downsample_hidden_size": 8},
        **GRID_IDS,
        audio_token_id=96,
        audio_start_token_id=97,
        vision_start_token_id=IMAGE_START,
    )


def _granite_docling() -> PreTrainedConfig:
    from transformers import GraniteDoclingConfig

    return GraniteDoclingConfig(
        text_config=text("granite_docling_text", tie_word_embeddings=True),
        vision_config={
            **TOWER,
            "num_hidden_layers": 3,
            "patch_size": PATCH,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        pad_token_id=0,
    )


def _coarse_tiles(seeds: Seeds) -> dict[str, Tensor]:
    """pixel_values [batch, most pictures, 3, side, side] and which of them are there; the coarse path for all."""
    most = max(len(row) for row in seeds)
    absent = torch.zeros(3, 8, 8)
    rows = [torch.stack([pixels(seed, 3, 8, 8) for seed in row] + [absent] * (most - len(row))) for row in seeds]
    there = torch.tensor([[True] * len(row) + [False] * (most - len(row)) for row in seeds])
    return {"pixel_values": torch.stack(rows), "pixel_attention_mask": there}


def _minicpm() -> PreTrainedConfig:
    return MiniCPMV4_6Config(
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
        vision_config={**TOWER, "num_hidden_layers": 3, "patch_size": PATCH, "insert_layer_id": 1},
        insert_layer_id=1,
        image_size=8,
        patch_size=PATCH,
        **GRID_IDS,
    )


def _one_long_row(seeds: Seeds) -> dict[str, Tensor]:
    """Pictures of 4 x 8 patches side by side: pixel_values [1, 3, patch, all patches * patch]."""
    count = len(flat(seeds))
    strips = [pixels(seed, 3, PATCH, 4 * 8 * PATCH) for seed in flat(seeds)]
    return {"pixel_values": torch.cat(strips, dim=-1)[None], "target_sizes": torch.tensor([[4, 8]] * count)}


def _molmo2() -> PreTrainedConfig:
    from transformers import Molmo2Config

    return Molmo2Config(
        text_config={
            "model_type": "molmo2_text",
            **TEXT,
            "additional_vocab_size": 8,
            "rope_scaling_layers": [1, 4, 6],
        },
        vision_config={
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "num_key_value_heads": 2,
            "head_dim": 8,
            "image_size": [8, 8],
            "num_position_embeddings": 4,
        },
        adapter_config={
            "vision_feature_layer": [-1, -2],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 24,
            "text_hidden_size": 32,
        },
        image_patch_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        low_res_image_start_token_id=94,
        frame_start_token_id=95,
        frame_end_token_id=96,
    )


def _pooled_crops(seeds: Seeds) -> dict[str, Tensor]:
    """One crop of 2 x 2 patches a picture, each patch a token of its own: pixel_values [crops, 4, 3 * 4 * 4]."""
    count = len(flat(seeds))
    return {
        "pixel_values": torch.stack([pixels(seed, 4, 48) for seed in flat(seeds)]),
        "image_token_pooling": torch.arange(4 * count)[:, None],
        "image_grids": torch.tensor([[2, 2, 0, 0]] * count),
        "image_num_crops": torch.ones(count, dtype=torch.long),
    }


THINKER = LANGUAGE_MODEL if since("5.22") else "model.layers"
FAMILIES = (
    Family("qwen2_5_omni_thinker", _qwen2_5_omni, THINKER, 7, patch_grid, SIX, BOTH),
    Family("qwen3_omni_moe_thinker", _qwen3_omni_moe, THINKER, 7, patch_grid, SIX, BOTH, refused=DEEPSTACK),
    Family(
        "granite_docling",
        _granite_docling,
        "model.text_model.layers",
        7,
        _coarse_tiles,
        (IMAGE,) * 4,
        may_refuse=everywhere("S", range(7)),
    ),
    Family(
        "minicpmv4_6",
        _minicpm,
        LANGUAGE_MODEL,
        8,
        _one_long_row,
        (IMAGE,) * 2,
        BOTH,
        may_refuse=everywhere("FB", mixers(QWEN3_5_TYPES)),
        possible=keeps_one_of(3, 7),
        saved_lists=sliced(layer_types=QWEN3_5_TYPES),
        tolerance=3e-4,
    ),
    Family(
        "molmo2",
        _molmo2,
        LANGUAGE_MODEL,
        7,
        _pooled_crops,
        (IMAGE_START, *(IMAGE,) * 4, IMAGE_END),
        per_token=modality_types,
        saved_lists=lambda kept: {"rope_scaling_layers": [new for new, old in enumerate(kept) if old in (1, 4, 6)]},
    ),
)
