"""Further families with pictures as grids of patches, hybrids and expert models among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CohereCompassConfig,
    Ernie4_5_VLMoeConfig,
    Exaone4_5_Config,
    Glm4vMoeConfig,
    GlmOcrConfig,
    HunYuanVLConfig,
    IdeficsConfig,
    Kimi_K25Config,
    PaddleOCRVLConfig,
    PreTrainedConfig,
    Qwen3_5MoeConfig,
    VideoLlama3Config,
)

from .patch_grids import (
    BOTH,
    DEEPSTACK,
    GRID_IDS,
    MROPE,
    PATCH,
    QWEN3_5_TYPES,
    SIX,
    START_END,
    deepstack_tower,
    grid_tower,
    modality_types,
    patch_grid,
)
from .picture_towers import LANGUAGE_MODEL, TEXT, TOWER, text
from .tiny import (
    BATCH,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    Family,
    Seeds,
    everywhere,
    flat,
    keeps_one_of,
    mixers,
    pixels,
    sliced,
)

EXAONE_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["full_attention"]
LFM3_TYPES = ["conv", "conv", "full_attention", "conv", "sliding_attention", "conv", "full_attention", "conv"]
COMPASS_TYPES = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
GLM_ENDS: dict[str, Any] = {
    **GRID_IDS,
    "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}


def unmerged(seeds: Seeds) -> dict[str, Tensor]:
    """Patches kept as squares: pixel_values [all patches, 3, patch, patch]."""
    grid = patch_grid(seeds)
    count = len(grid["pixel_values"])
    return {**grid, "pixel_values": grid["pixel_values"][:, : 3 * PATCH * PATCH].reshape(count, 3, PATCH, PATCH)}


def flat_patches(seeds: Seeds) -> dict[str, Tensor]:
    """One frame: pixel_values [all patches, 3 * patch * patch]."""
    grid = patch_grid(seeds)
    return {**grid, "pixel_values": grid["pixel_values"][:, : 3 * PATCH * PATCH]}


def _qwen3_5_moe() -> PreTrainedConfig:
    return Qwen3_5MoeConfig(
        text_config=text(
            "qwen3_5_moe_text",
            num_hidden_layers=8,
            layer_types=QWEN3_5_TYPES,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        ),
        vision_config=deepstack_tower(),
        **GRID_IDS,
        **START_END,
    )


def _glm4v_moe() -> PreTrainedConfig:
    return Glm4vMoeConfig(
        text_config=text(
            "glm4v_moe_text",
            rope_parameters={**MROPE, "partial_rotary_factor": 1.0},
            first_k_dense_replace=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        vision_config=grid_tower(hidden_size=16, intermediate_size=24, out_hidden_size=32, image_size=8),
        **GLM_ENDS,
    )


def _glm_ocr() -> PreTrainedConfig:
    return GlmOcrConfig(
        text_config=text("glm_ocr_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        vision_config=grid_tower(hidden_size=16, intermediate_size=24, out_hidden_size=32),
        **GLM_ENDS,
    )


ERNIE_TYPES = ["dense", "sparse", "sparse", "dense", "sparse", "sparse", "sparse"]


def _ernie() -> PreTrainedConfig:
    return Ernie4_5_VLMoeConfig(
        text_config=text(
            "ernie4_5_vl_moe_text",
            rope_parameters={**MROPE, "mrope_section": [1, 1, 2]},
            moe_intermediate_size=[16, 8],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=ERNIE_TYPES,
            tie_word_embeddings=True,
        ),
        vision_config={**grid_tower(hidden_size=16, intermediate_size=24, temporal_merge_size=2)},
        **GLM_ENDS,
    )


def _ernie_types(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    types = modality_types(ids, prompt_length)["mm_token_type_ids"]
    return {"mm_token_type_ids": types, "moe_mm_token_type_ids": types}


def _exaone() -> PreTrainedConfig:
    return Exaone4_5_Config(
        text_config=text("exaone4", sliding_window=6, sliding_window_pattern=3, layer_types=EXAONE_TYPES),
        vision_config=grid_tower(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=32,
            num_key_value_heads=2,
            fullatt_block_indexes=[1],
            window_size=8,
        ),
        **GRID_IDS,
    )


def _paddle() -> PreTrainedConfig:
    return PaddleOCRVLConfig(
        text_config=text("paddleocr_vl_text", rope_parameters=MROPE, tie_word_embeddings=True),
        vision_config={**TOWER, "patch_size": PATCH, "spatial_merge_size": 2},
        **GRID_IDS,
        **START_END,
    )


def _hunyuan() -> PreTrainedConfig:
    return HunYuanVLConfig(
        text_config=text(
            "hunyuan_vl_text", tie_word_embeddings=True, rope_parameters={**MROPE, "mrope_section": [1, 1, 1, 1]}
        ),
        vision_config={
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "num_key_value_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 32,
            "text_hidden_size": 32,
            "max_image_size": 16,
        },
        image_token_id=IMAGE,
        im_start_id=IMAGE_START,
        im_end_id=IMAGE_END,
        im_newline_id=94,
    )


def _kimi() -> PreTrainedConfig:
    settings = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return Kimi_K25Config(
        text_config={
            "model_type": "deepseek_v3",
            **settings,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        vision_config={
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        projection_hidden_size=16,
        tie_word_embeddings=False,
        **GRID_IDS,
        **START_END,
    )


def _compass() -> PreTrainedConfig:
    return CohereCompassConfig(
        text_config=text(
            "cohere_compass_text",
            sliding_window=6,
            layer_types=COMPASS_TYPES,
            logit_scale=1.0,
            rope_parameters={
                "full_attention": {**MROPE, "mrope_interleaved": True},
                "sliding_attention": {**MROPE, "rope_theta": 500.0, "mrope_interleaved": True},
            },
        ),
        vision_config=deepstack_tower(),
        **GRID_IDS,
        **START_END,
    )


def _lfm3() -> PreTrainedConfig:
    from transformers import Lfm3VlConfig

    return Lfm3VlConfig(
        text_config=text(
            "lfm3", num_hidden_layers=8, layer_types=LFM3_TYPES, sliding_window=6, tie_word_embeddings=True
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": PATCH,
            "layer_types": ["conv", "full_attention"],
        },
        projector_hidden_size=24,
        **GRID_IDS,
        **START_END,
    )


def _hyperclovax() -> PreTrainedConfig:
    from transformers import HyperCLOVAXVisionV2Config

    return HyperCLOVAXVisionV2Config(
        text_config=text("hyperclovax", residual_multiplier=0.8, attention_multiplier=0.4),
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            **grid_tower(
                hidden_size=16, intermediate_size=24, out_hidden_size=32, fullatt_block_indexes=[1], window_size=8
            ),
        },
        **GRID_IDS,
    )


def _video_llama_3() -> PreTrainedConfig:
    return VideoLlama3Config(
        text_config=text("qwen2"),
        vision_config={
            "model_type": "video_llama_3_vision",
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "patch_size": PATCH,
        },
        **GRID_IDS,
    )


def _merged_two_by_two(seeds: Seeds) -> dict[str, Tensor]:
    return {**flat_patches(seeds), "image_merge_sizes": torch.tensor([2] * len(flat(seeds)))}


def _idefics() -> PreTrainedConfig:
    settings = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
    return IdeficsConfig(
        **{**settings, "num_hidden_layers": 6},
        cross_layer_interval=2,
        alpha_initializer="ones",
        vision_config={
            "embed_dim": 16,
            "image_size": 8,
            "intermediate_size": 24,
            "patch_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    )


def _two_pictures(seeds: Seeds) -> dict[str, Tensor]:
    absent = torch.zeros(3, 8, 8)
    rows = [torch.stack([pixels(seed, 3, 8, 8) for seed in row] + [absent] * (2 - len(row))) for row in seeds]
    return {"pixel_values": torch.stack(rows)}


def _seen_pictures(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    """Idefics: [tokens, 2 pictures]; a token sees the last picture before it."""
    number = (ids == IMAGE).cumsum(0)
    return {"image_attention_mask": torch.stack([number == 1, number == 2], dim=-1).long()}


PLAIN_SIX = (IMAGE,) * 6

FAMILIES = (
    Family(
        "qwen3_5_moe",
        _qwen3_5_moe,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        modality_types,
        may_refuse=everywhere("FB", mixers(QWEN3_5_TYPES)),
        refused_plans=("RRRSRRRS",),
        possible=keeps_one_of(3, 7),
        saved_lists=sliced(layer_types=QWEN3_5_TYPES),
        tolerance=3e-4,
    ),
    Family("glm4v_moe", _glm4v_moe, LANGUAGE_MODEL, 7, patch_grid, SIX, BOTH, modality_types),
    Family("glm_ocr", _glm_ocr, LANGUAGE_MODEL, 7, patch_grid, SIX, BOTH, modality_types),
    Family(
        "ernie4_5_vl_moe",
        _ernie,
        LANGUAGE_MODEL,
        7,
        flat_patches,
        SIX,
        BOTH,
        _ernie_types,
        saved_lists=sliced(mlp_layer_types=ERNIE_TYPES),
    ),
    Family(
        "exaone4_5",
        _exaone,
        LANGUAGE_MODEL,
        7,
        patch_grid,
        SIX,
        BOTH,
        saved_lists=sliced(layer_types=EXAONE_TYPES),
    ),
    Family("paddleocr_vl", _paddle, LANGUAGE_MODEL, 7, unmerged, SIX, BOTH, modality_types),
    Family(
        "hunyuan_vl",
        _hunyuan,
        LANGUAGE_MODEL,
        7,
        flat_patches,
        (IMAGE,) * 10,
        per_token=modality_types,
        traps={BATCH: "the positions of a picture depend on how many pictures earlier prompts of the batch have"},
    ),
    Family("kimi_k25", _kimi, LANGUAGE_MODEL, 7, unmerged, SIX, BOTH),
    Family(
        "cohere_compass",
        _compass,
        LANGUAGE_MODEL,
        7,
        patch_grid,
        SIX,
        BOTH,
        modality_types,
        refused=DEEPSTACK,
        saved_lists=sliced(layer_types=COMPASS_TYPES),
    ),
    Family(
        "lfm3_vl",
        _lfm3,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        may_refuse=everywhere("FB", mixers(LFM3_TYPES)),
        possible=keeps_one_of(2, 4, 6),
        saved_lists=sliced(layer_types=LFM3_TYPES),
    ),
    Family("hyperclovax_vision_v2", _hyperclovax, LANGUAGE_MODEL, 7, patch_grid, PLAIN_SIX, BOTH),
    Family("video_llama_3", _video_llama_3, LANGUAGE_MODEL, 7, _merged_two_by_two, PLAIN_SIX, BOTH),
    # Gated cross-attention blocks in a list of their own, before every second decoder layer by its position.
    Family(
        "idefics",
        _idefics,
        "model.layers",
        6,
        _two_pictures,
        (IMAGE,),
        frozenset(),
        _seen_pictures,
        text_only=False,
        may_refuse=everywhere("FBS", range(6)),
    ),
)
