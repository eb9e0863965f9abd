"""Families whose pictures arrive as grids of patches (Qwen-VL and its like), as tiles (mllama), or with two towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma4Config,
    Glm4vConfig,
    Lfm2VlConfig,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)

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
    flat,
    pixels,
    sliced,
)

PATCH = 2
GRID_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
START_END: dict[str, Any] = {"vision_start_token_id": IMAGE_START, "vision_end_token_id": IMAGE_END}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

QWEN3_5_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
LFM2_TYPES = ["conv", "conv", "full_attention", "conv", "full_attention", "conv", "full_attention", "conv"]
GEMMA3N_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
GEMMA3N_WIDTHS = [48, 48, 48, 48, 40, 40, 40, 40]
GEMMA3N_SPARSITY = [0.8, 0.8, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
GEMMA4_TYPES = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * 2 + ["full_attention"] * 2


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


SIX = (IMAGE_START, *(IMAGE,) * 6, IMAGE_END)
FOUR = (IMAGE_START, *(IMAGE,) * 4, IMAGE_END)
BOTH = frozenset({IMAGE, VIDEO})


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


def keeps_one_of(*layers: int) -> Callable[[str], bool]:
    """Whether a plan leaves at least one of these layers in place."""
    return lambda plan: any(plan[layer] != "S" for layer in layers)


def _self_attention_first(plan: str) -> bool:
    """mllama: text-only prompts take the sequence length from the cache of the first layer."""
    kept = [layer for layer, letter in enumerate(plan) if letter != "S"]
    return bool(kept) and kept[0] not in (2, 5)


def everywhere(letters: str, layers: Iterable[int]) -> dict[int, str]:
    return dict.fromkeys(layers, letters)


def mixers(types: Sequence[str]) -> list[int]:
    """Layers without attention: keys and values, and so freeze and bypass, mean nothing there by themselves."""
    return [layer for layer, kind in enumerate(types) if kind in ("linear_attention", "conv")]


KV_PROVIDERS_3N = {2: "S", 4: "S"}  # the last layer of each kind before the sharing ones
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
