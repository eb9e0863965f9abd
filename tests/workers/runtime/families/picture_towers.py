"""Families whose vision tower takes pictures of one fixed size (CLIP, SigLIP and their like)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AriaConfig,
    AyaVisionConfig,
    Blip2Config,
    Cohere2VisionConfig,
    Gemma3Config,
    Idefics2Config,
    Idefics3Config,
    InternVLConfig,
    Llama4Config,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PaliGemmaConfig,
    SmolVLMConfig,
    VipLlavaConfig,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .tiny import BATCH, IMAGE, IMAGE_END, IMAGE_START, PAD, VOCABULARY, Family, Seeds, flat, pixels, since, sliced

SIDE = 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}

GEMMA3_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
AYA_TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
COHERE2_TYPES = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]


def stacked(seeds: Seeds) -> dict[str, Tensor]:
    """pixel_values [pictures, 3, side, side]."""
    return {"pixel_values": torch.stack([pixels(seed, 3, SIDE, SIDE) for seed in flat(seeds)])}


def with_sizes(seeds: Seeds) -> dict[str, Tensor]:
    return {**stacked(seeds), "image_sizes": torch.tensor([[SIDE, SIDE]] * len(flat(seeds)))}


def tiled(seeds: Seeds) -> dict[str, Tensor]:
    """A base picture and two tiles: pixel_values [pictures, 3, 3, side, side]; the original is 16 x 8 pixels."""
    values = torch.stack([pixels(seed, 3, 3, SIDE, SIDE) for seed in flat(seeds)])
    return {"pixel_values": values, "image_sizes": torch.tensor([[2 * SIDE, SIDE]] * len(values))}


def padded_pictures(seeds: Seeds) -> dict[str, Tensor]:
    """pixel_values [batch, most pictures, 3, side, side]; absent pictures are zeros, as the processors make them."""
    most = max(len(row) for row in seeds)
    absent = torch.zeros(3, SIDE, SIDE)
    rows = [torch.stack([pixels(seed, 3, SIDE, SIDE) for seed in row] + [absent] * (most - len(row))) for row in seeds]
    return {"pixel_values": torch.stack(rows)}


def image_types(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    """Gemma 3: type 1 for picture tokens, which attend to each other in both directions."""
    return {"token_type_ids": (ids == IMAGE).long()}


def prefix_types(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    """PaliGemma: the prompt (type 0) attends to itself in both directions, generated tokens (type 1) do not."""
    return {"token_type_ids": (torch.arange(len(ids)) >= prompt_length).long()}


def text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, **changes}


def tower(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TOWER, **changes}


def _llava() -> LlavaConfig:
    return LlavaConfig(
        vision_config=tower("clip_vision_model"), text_config=text("llama"), image_token_index=IMAGE, image_seq_length=4
    )


def _llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        image_seq_length=4,
    )


def _llava_onevision() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=text("qwen2"),
        image_token_index=IMAGE,
        video_token_index=93,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        vision_aspect_ratio="anyres_max_9",
    )


def _vipllava() -> VipLlavaConfig:
    return VipLlavaConfig(
        vision_config=tower("clip_vision_model", num_hidden_layers=3),
        text_config=text("llama"),
        image_token_index=IMAGE,
        image_seq_length=4,
        **{"vision_feature_layer" if since("5.23") else "vision_feature_layers": (-1, -2)},
    )


def _idefics2() -> Idefics2Config:
    return Idefics2Config(
        vision_config=tower("idefics2_vision"),
        text_config=text("mistral", sliding_window=7),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    )


def _idefics3() -> Idefics3Config:
    return Idefics3Config(
        vision_config=tower("idefics3_vision", patch_size=2), text_config=text("llama"), image_token_id=IMAGE
    )


def _smolvlm() -> SmolVLMConfig:
    return SmolVLMConfig(
        vision_config=tower("smolvlm_vision", patch_size=2),
        text_config=text("llama", tie_word_embeddings=True),
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )


def _paligemma() -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False, projection_dim=32),
        text_config=text("gemma", tie_word_embeddings=True),
        image_token_index=IMAGE,
        vocab_size=VOCABULARY,
        projection_dim=32,
        hidden_size=32,
    )


def gemma3_config(**changes: Any) -> Gemma3Config:
    return Gemma3Config(
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=text(
            "gemma3_text",
            tie_word_embeddings=True,
            query_pre_attn_scalar=8,
            **{
                "sliding_window": 6,
                "layer_types": GEMMA3_TYPES,
                **changes,
            },
        ),
        mm_tokens_per_image=4,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        image_token_index=IMAGE,
    )


def _mistral3() -> Mistral3Config:
    return Mistral3Config(
        vision_config=tower("pixtral", head_dim=8, patch_size=2),
        text_config=text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _internvl() -> InternVLConfig:
    return InternVLConfig(
        vision_config=tower("internvl_vision", image_size=(SIDE, SIDE), patch_size=(2, 2)),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _aya_vision() -> AyaVisionConfig:
    return AyaVisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=text(
            "cohere2",
            tie_word_embeddings=True,
            logit_scale=1.0,
            sliding_window=6,
            layer_types=AYA_TYPES,
            num_hidden_layers=8,
        ),
        image_token_index=IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )


def _cohere2_vision() -> Cohere2VisionConfig:
    return Cohere2VisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False, patch_size=2),
        text_config=text(
            "cohere2",
            tie_word_embeddings=True,
            logit_scale=1.0,
            sliding_window=6,
            layer_types=COHERE2_TYPES,
        ),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=32,
    )


def _llama4() -> Llama4Config:
    # The forward of transformers 5.24.0 reads image_outputs of its decoder's output, which has none: not even the dense
    # model runs. With the attribute there, empty, everything else can be tested.
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None
    return Llama4Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 2,
            "vision_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        text_config=text(
            "llama4_text",
            num_hidden_layers=8,
            intermediate_size_mlp=48,
            num_local_experts=3,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=3,
            attention_chunk_size=8,
            floor_scale=4,
        ),
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        image_token_index=IMAGE,
    )


def _llama4_lists(kept: tuple[int, ...]) -> dict[str, object]:
    """Every third layer has no rotary positions, every second has experts; both as they were before the cut."""
    return {
        "moe_layers": [new for new, old in enumerate(kept) if old % 2 == 1],
        "no_rope_layers": [int(old % 3 != 2) for old in kept],
        "layer_types": ["full_attention" if old % 3 == 2 else "chunked_attention" for old in kept],
    }


def _blip2() -> Blip2Config:
    return Blip2Config(
        vision_config=dict(TOWER),
        qformer_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "max_position_embeddings": 64,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=IMAGE,
    )


def _aria() -> AriaConfig:
    return AriaConfig(
        vision_config=tower("idefics3_vision"),
        text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 3},
    )


LANGUAGE_MODEL = "model.language_model.layers"
TEXT_MODEL = "model.text_model.layers"
FOUR = (IMAGE,) * 4

FAMILIES = (
    Family("llava", _llava, LANGUAGE_MODEL, 7, stacked, FOUR),
    # 4 base patches, 4 x 2 tile patches in a picture twice as high as wide, and one newline per row of the grid.
    Family("llava_next", _llava_next, LANGUAGE_MODEL, 7, tiled, (IMAGE,) * 16),
    Family("llava_onevision", _llava_onevision, LANGUAGE_MODEL, 7, tiled, (IMAGE,) * 16),
    Family("vipllava", _vipllava, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("idefics2", _idefics2, TEXT_MODEL, 7, padded_pictures, (IMAGE_START, *(IMAGE,) * 3, IMAGE_END)),
    Family("idefics3", _idefics3, TEXT_MODEL, 7, padded_pictures, (IMAGE_START, *FOUR, IMAGE_END)),
    Family("smolvlm", _smolvlm, TEXT_MODEL, 7, padded_pictures, (IMAGE_START, *FOUR, IMAGE_END)),
    Family("paligemma", _paligemma, LANGUAGE_MODEL, 7, stacked, FOUR, per_token=prefix_types),
    Family(
        "gemma3",
        gemma3_config,
        LANGUAGE_MODEL,
        7,
        stacked,
        (IMAGE_START, *FOUR, IMAGE_END),
        per_token=image_types,
        saved_lists=sliced(layer_types=GEMMA3_TYPES),
    ),
    Family("mistral3", _mistral3, LANGUAGE_MODEL, 7, with_sizes, FOUR),
    Family("internvl", _internvl, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("aya_vision", _aya_vision, LANGUAGE_MODEL, 8, stacked, (IMAGE,), saved_lists=sliced(layer_types=AYA_TYPES)),
    Family(
        "cohere2_vision",
        _cohere2_vision,
        LANGUAGE_MODEL,
        7,
        stacked,
        FOUR,
        saved_lists=sliced(layer_types=COHERE2_TYPES),
    ),
    Family(
        "llama4",
        _llama4,
        "language_model.model.layers",
        8,
        stacked,
        (IMAGE_START, *FOUR, IMAGE_END),
        may_refuse={2: "FB", 5: "FB"},  # temperature tuning takes positions from the number of rows
        traps={BATCH: "temperature tuning counts the padding as positions"},
        saved_lists=_llama4_lists,
    ),
    Family(
        "blip-2",
        _blip2,
        "language_model.model.decoder.layers",
        6,
        stacked,
        FOUR,
        max_images=1,
        text_only=False,
    ),
    Family("aria", _aria, LANGUAGE_MODEL, 7, stacked, (IMAGE,) * 3),
)
