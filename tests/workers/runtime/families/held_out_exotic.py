"""Families of unusual build: sparse attention with an indexer, several residual streams, keys shared between layers.

Here the runtime may decline any action, or the whole family, with a clear error. What it accepts has to be right.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma4UnifiedConfig,
    Glm5NextConfig,
    MiniMaxM3VLConfig,
    MuseGlimmerConfig,
    PreTrainedConfig,
    Qwen4ExpConfig,
    Step3p7Config,
)

from .held_out_grids import GLM_ENDS
from .patch_grids import (
    BOTH,
    GRID_IDS,
    MROPE,
    PATCH,
    SIX,
    START_END,
    deepstack_tower,
    grid_tower,
    modality_types,
    patch_grid,
)
from .picture_towers import LANGUAGE_MODEL, TEXT, TOWER, text, tower, with_sizes
from .tiny import (
    BATCH,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    Family,
    Seeds,
    everywhere,
    flat,
    keeps_one_of,
    pixels,
    since,
    sliced,
)
from .uneven_stacks import GEMMA4_TYPES, positioned_patches

ANYTHING = everywhere("FBS", range(8))
MUSE_TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
STEP_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 2
STEP_MLPS = ["dense", "dense", *["sparse"] * 6]
QWEN4_TYPES = ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"] * 2
WITHOUT_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}


def _muse_glimmer() -> PreTrainedConfig:
    return MuseGlimmerConfig(
        text_config=text(
            "muse_glimmer_text",
            num_hidden_layers=8,
            sliding_window=6,
            layer_types=MUSE_TYPES,
            layer_rope_theta=[10000.0, 10000.0, 10000.0, 0] * 2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        vision_config={
            **{key: value for key, value in TOWER.items() if key != "image_size"},
            "patch_size": PATCH,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "layer_types": ["window_attention", "full_attention"],
        },
        out_hidden_size=64,
        projector_hidden_size=24,
        **GRID_IDS,
    )


def gemma4_unified(**changes: Any) -> PreTrainedConfig:
    return Gemma4UnifiedConfig(
        text_config=text(
            "gemma4_unified_text",
            num_hidden_layers=8,
            tie_word_embeddings=True,
            sliding_window=6,
            layer_types=GEMMA4_TYPES,
            global_head_dim=16,
            **{"num_kv_shared_layers": 2, **changes},
        ),
        vision_config={
            "patch_size": PATCH,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
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


def _latent(**changes: Any) -> dict[str, Any]:
    """Latent attention with an indexer that keeps every key of a short prompt."""
    return {
        **WITHOUT_HEAD_DIM,
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
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
        "index_topk": 64,
        "index_head_dim": 8,
        "index_n_heads": 2,
        **changes,
    }


def _mistral_large4() -> PreTrainedConfig:
    from transformers import MistralLarge4Config

    return MistralLarge4Config(
        text_config={
            "model_type": "mistral_large4_text",
            **{key: value for key, value in _latent().items() if key != "q_lora_rank"},
            "first_k_dense_replace": 2,
            "no_rope_layer_interval": 3,
            "kv_source_layers": [0, 0, 2, 3, 3, 5, 6, 6],
        },
        vision_config=tower("pixtral", head_dim=8, patch_size=2),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def _qwen4_exp() -> PreTrainedConfig:
    return Qwen4ExpConfig(
        text_config=text(
            "qwen4_exp_text",
            num_hidden_layers=8,
            layer_types=QWEN4_TYPES,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=64,
            indexer_compress_ratio=4,
            rope_parameters={**MROPE, "mrope_interleaved": True},
        ),
        vision_config=deepstack_tower(),
        **GRID_IDS,
        **START_END,
    )


def _minimax_m3() -> PreTrainedConfig:
    return MiniMaxM3VLConfig(
        text_config=text(
            "minimax_m3_vl_text",
            num_hidden_layers=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            dense_intermediate_size=32,
            shared_intermediate_size=16,
            rotary_dim=4,
            mlp_layer_types=STEP_MLPS,
            layer_types=["full_attention"] * 8,
        ),
        vision_config={
            **TOWER,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=32,
        merged_hidden_size=128,
    )


def _step() -> PreTrainedConfig:
    return Step3p7Config(
        text_config=text(
            "step3p7_text",
            num_hidden_layers=8,
            sliding_window=6,
            num_sliding_attention_heads=4,
            layer_types=STEP_TYPES,
            mlp_layer_types=STEP_MLPS,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            share_expert_dim=16,
            query_pre_attn_scalar=8,
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "mlp_ratio": 1.5,
            "max_position_embeddings": 64,
        },
        image_token_id=IMAGE,
    )


def _large(seeds: Seeds) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([pixels(seed, 3, 32, 32) for seed in flat(seeds)])}


def _glm5_next() -> PreTrainedConfig:
    return Glm5NextConfig(
        text_config={
            "model_type": "glm5_next_text",
            **_latent(qk_rope_head_dim=0, qk_nope_head_dim=8),
            "mlp_layer_types": STEP_MLPS,
            "layer_types": QWEN4_TYPES,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "index_kpool": 4,
        },
        vision_config=grid_tower(
            hidden_size=16, intermediate_size=24, out_hidden_size=32, projection_intermediate_size=24
        ),
        **GLM_ENDS,
    )


FAMILIES = (
    Family(
        "muse_glimmer",
        _muse_glimmer,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        saved_lists=sliced(layer_types=MUSE_TYPES, layer_rope_theta=[10000.0, 10000.0, 10000.0, 0] * 2),
    ),
    Family(
        "gemma4_unified",
        gemma4_unified,
        LANGUAGE_MODEL,
        8,
        positioned_patches,
        (IMAGE_START, *(IMAGE,) * 16, IMAGE_END),
        BOTH,
        modality_types,
        refused={3: "S", 5: "S"},
        may_refuse={3: "B", 5: "B", 6: "B", 7: "BS"},
        savable=lambda plan: plan[6:] != "SS",
    ),
    Family(
        "mistral_large4",
        _mistral_large4,
        LANGUAGE_MODEL,
        8,
        with_sizes,
        (IMAGE,) * 4,
        may_refuse=ANYTHING,
        may_be_unsupported=True,
    ),
    Family(
        "qwen4_exp",
        _qwen4_exp,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        modality_types,
        may_refuse=ANYTHING,
        may_be_unsupported=True,
        possible=keeps_one_of(3, 7),
        tolerance=3e-4,
    ),
    Family(
        "minimax_m3_vl",
        _minimax_m3,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        may_refuse=everywhere("FB", range(8)),  # its attention can hold an indexer that counts rows
        saved_lists=sliced(mlp_layer_types=STEP_MLPS),
        traps={} if since("5.23") else {BATCH: "all pictures of a batch see each other"},
    ),
    Family(
        "step3p7",
        _step,
        LANGUAGE_MODEL,
        8,
        _large,
        (IMAGE,) * 4,
        saved_lists=sliced(layer_types=STEP_TYPES, mlp_layer_types=STEP_MLPS),
    ),
    Family(
        "glm5_next",
        _glm5_next,
        LANGUAGE_MODEL,
        8,
        patch_grid,
        SIX,
        BOTH,
        modality_types,
        may_refuse=ANYTHING,
        may_be_unsupported=True,
        possible=keeps_one_of(3, 7),
        tolerance=3e-4,
    ),
)
