"""Further families with pictures of one size. No one tuned anything for them: they check that generic means generic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    ChameleonConfig,
    DeepseekVLConfig,
    FuyuConfig,
    GotOcr2Config,
    Granite4VisionConfig,
    InstructBlipConfig,
    JanusConfig,
    Kosmos2Config,
    LightOnOcrConfig,
    LlavaConfig,
    LlavaNextVideoConfig,
    Ovis2Config,
    PreTrainedConfig,
    QianfanOCRConfig,
    VideoLlavaConfig,
)

from .picture_towers import (
    LANGUAGE_MODEL,
    SIDE,
    TEXT,
    TOWER,
    gemma3_config,
    image_types,
    stacked,
    text,
    tiled,
    tower,
    with_sizes,
)
from .tiny import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PAD,
    VIDEO,
    VOCABULARY,
    Family,
    Seeds,
    everywhere,
    flat,
    pixels,
    since,
    sliced,
)

FOUR = (IMAGE,) * 4
ALTERNATING = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
SLIDING_BUT_LAST = ["sliding_attention"] * 6 + ["full_attention"]


def _llava_pixtral() -> PreTrainedConfig:
    return LlavaConfig(
        vision_config=tower("pixtral", head_dim=8),
        text_config=text("mistral", sliding_window=6),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _llava_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    """LLaVA over another language model: what the text side brings decides."""
    return LlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text(model_type, **changes),
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def _llava_qwen3_moe() -> PreTrainedConfig:
    return _llava_of(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0, 4]
    )


def _llava_deepseek_v3() -> PreTrainedConfig:
    settings = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return LlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config={
            "model_type": "deepseek_v3",
            **settings,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def _llava_gpt_oss() -> PreTrainedConfig:
    return _llava_of("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=6, layer_types=ALTERNATING)


def _llava_gemma2() -> PreTrainedConfig:
    return _llava_of("gemma2", sliding_window=6, query_pre_attn_scalar=8, layer_types=ALTERNATING)


def _llava_phi3() -> PreTrainedConfig:
    return _llava_of("phi3")


def _llava_smollm3() -> PreTrainedConfig:
    return _llava_of("smollm3", no_rope_layers=[1, 1, 0, 1, 1, 0, 1])


def _llava_granite() -> PreTrainedConfig:
    return _llava_of("granite", attention_multiplier=0.4, residual_multiplier=0.7)


def _gemma3_other_pattern() -> PreTrainedConfig:
    return gemma3_config(layer_types=SLIDING_BUT_LAST, sliding_window=4)


def _video_llava() -> PreTrainedConfig:
    return VideoLlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=5,
    )


def _stacked_images(seeds: Seeds) -> dict[str, Tensor]:
    return {"pixel_values_images": stacked(seeds)["pixel_values"]}


def _llava_next_video() -> PreTrainedConfig:
    return LlavaNextVideoConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )


def _got_ocr2() -> PreTrainedConfig:
    return GotOcr2Config(
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 24,
        },
        text_config=text("qwen2", tie_word_embeddings=True),
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def _large(seeds: Seeds) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([pixels(seed, 3, 32, 32) for seed in flat(seeds)])}


def _ovis2() -> PreTrainedConfig:
    return Ovis2Config(
        vision_config=tower("ovis2", vocab_size=12, num_visual_indicator_tokens=5),
        text_config=text("qwen2", tie_word_embeddings=True),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[94, 95, 96, 97, 98],
        vocab_size=VOCABULARY,
        hidden_size=32,
    )


def _deepseek_vl() -> PreTrainedConfig:
    return DeepseekVLConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False),
        text_config=text("llama"),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _janus() -> PreTrainedConfig:
    return JanusConfig(
        vision_config={
            "model_type": "janus_vision_model",
            **{key: value for key, value in TOWER.items() if key != "intermediate_size"},
            "mlp_ratio": 1.5,
            "projection_dim": 32,
            "num_image_tokens": 4,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 8,
            "image_token_embed_dim": 8,
        },
        text_config=text("llama"),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _kosmos2() -> PreTrainedConfig:
    return Kosmos2Config(
        text_config={
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "embed_dim": 32,
            "layers": 6,
            "ffn_dim": 48,
            "attention_heads": 4,
            "pad_token_id": PAD,
        },
        vision_config=dict(TOWER),
        latent_query_num=3,
    )


def _kosmos2_mask(ids: Tensor, prompt_length: int) -> dict[str, Tensor]:
    return {"image_embeds_position_mask": ids == IMAGE}


def _instructblip() -> PreTrainedConfig:
    return InstructBlipConfig(
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
        text_config=text("llama"),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def _instructed(seeds: Seeds) -> dict[str, Tensor]:
    question = torch.tensor([[30, 31, 32, 33]] * len(flat(seeds)))
    return {
        **stacked(seeds),
        "qformer_input_ids": question,
        "qformer_attention_mask": torch.ones_like(question),
    }


def _lighton_ocr() -> PreTrainedConfig:
    return LightOnOcrConfig(
        vision_config=tower("pixtral", head_dim=8, patch_size=2),
        text_config=text("qwen3"),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _qianfan_ocr() -> PreTrainedConfig:
    return QianfanOCRConfig(
        vision_config=tower("qianfan_ocr_vision", image_size=(SIDE, SIDE), patch_size=(2, 2)),
        text_config=text("qwen3"),
        image_token_id=IMAGE,
        image_seq_length=4,
    )


def _chameleon() -> PreTrainedConfig:
    return ChameleonConfig(
        **{key: value for key, value in TEXT.items() if key != "head_dim"},
        vocabulary_map={
            "<image>": IMAGE,
            "<reserved08707>": IMAGE,
            **{f"IMGIMG{n}Z": 4 + i for i, n in enumerate("ABCDEFGH")},
        },
        image_token_id=IMAGE,
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 8,
            "latent_channels": 8,
            "resolution": SIDE,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
        },
    )


def _fuyu() -> PreTrainedConfig:
    settings = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
    return FuyuConfig(
        text_config={"model_type": "persimmon", **settings},
        patch_size=4,
        image_size=SIDE,
        image_token_id=IMAGE,
        hidden_size=TEXT["hidden_size"],  # read here before 5.20, in the text's configuration since
    )


def _patches(seeds: Seeds) -> dict[str, Tensor]:
    """Fuyu: [pictures, 4 patches, patch * patch * 3]."""
    return {
        "pixel_values" if since("5.22") else "image_patches": torch.stack([pixels(seed, 4, 48) for seed in flat(seeds)])
    }


def _granite4_vision() -> PreTrainedConfig:
    return Granite4VisionConfig(
        vision_config=tower("siglip_vision_model", hidden_size=64, patch_size=2, vision_use_head=False),
        text_config=text("granite4_vision_text", num_hidden_layers=8),
        qformer_config={
            "model_type": "blip_2_qformer",
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "cross_attention_frequency": 1,
            # Those of the tower, which 5.20 and newer set by themselves.
            "hidden_size": 64,
            "num_attention_heads": 1,
            "encoder_hidden_size": 64,
        },
        image_token_index=IMAGE,
        downsample_rate="1/2",
        deepstack_layer_map=[[0, 0]],
        spatial_target_layers=[2, 3, 5, 6],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )


FAMILIES = (
    Family("llava over pixtral", _llava_pixtral, LANGUAGE_MODEL, 7, with_sizes, FOUR),
    Family("llava over qwen3_moe", _llava_qwen3_moe, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("llava over deepseek_v3", _llava_deepseek_v3, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family(
        "llava over gpt_oss",
        _llava_gpt_oss,
        LANGUAGE_MODEL,
        7,
        stacked,
        FOUR,
        attention="eager",
        saved_lists=sliced(layer_types=ALTERNATING),
    ),
    Family(
        "llava over gemma2",
        _llava_gemma2,
        LANGUAGE_MODEL,
        7,
        stacked,
        FOUR,
        attention="eager",
        saved_lists=sliced(layer_types=ALTERNATING),
    ),
    Family("llava over phi3", _llava_phi3, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("llava over smollm3", _llava_smollm3, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("llava over granite", _llava_granite, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family(
        "gemma3 of another pattern",
        _gemma3_other_pattern,
        LANGUAGE_MODEL,
        7,
        stacked,
        (IMAGE_START, *FOUR, IMAGE_END),
        per_token=image_types,
        saved_lists=sliced(layer_types=SLIDING_BUT_LAST),
    ),
    Family("video_llava", _video_llava, LANGUAGE_MODEL, 7, _stacked_images, (IMAGE,) * 4),
    Family("llava_next_video", _llava_next_video, LANGUAGE_MODEL, 7, tiled, (IMAGE,) * 16),
    Family("got_ocr2", _got_ocr2, LANGUAGE_MODEL, 7, _large, FOUR, attention="eager"),
    Family("ovis2", _ovis2, LANGUAGE_MODEL, 7, stacked, (95, *FOUR, 96)),
    Family("deepseek_vl", _deepseek_vl, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("janus", _janus, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family(
        "kosmos-2",
        _kosmos2,
        "text_model.model.layers",
        6,
        stacked,
        (IMAGE,) * 3,
        per_token=_kosmos2_mask,
        max_images=1,
        text_only=False,
        may_refuse=everywhere("FB", range(6)),  # its config names no placeholder id
        # Before 5.23 its way from pictures to text looks back only where attention is sdpa, and both ways where eager.
        attention="sdpa" if since("5.23") else "eager",
    ),
    Family(
        "instructblip",
        _instructblip,
        "language_model.model.layers",
        7,
        _instructed,
        FOUR,
        max_images=1,
        text_only=False,
    ),
    Family("lighton_ocr", _lighton_ocr, LANGUAGE_MODEL, 7, with_sizes, FOUR),
    Family("qianfan_ocr", _qianfan_ocr, LANGUAGE_MODEL, 7, stacked, FOUR),
    Family("chameleon", _chameleon, "model.layers", 7, stacked, FOUR),
    Family("fuyu", _fuyu, LANGUAGE_MODEL, 7, _patches, FOUR),
    # Vision features are added before list positions 0, 2, 3, 5 and 6, which the outer config names.
    Family(
        "granite4_vision",
        _granite4_vision,
        LANGUAGE_MODEL,
        8,
        tiled,
        (IMAGE,) * 16,
        may_refuse=everywhere("S", range(8)),
    ),
)
