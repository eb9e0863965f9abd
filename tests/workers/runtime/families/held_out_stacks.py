"""One simple picture side over many text models: what differs between families is mostly the text side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlavaConfig, PreTrainedConfig

from .picture_towers import LANGUAGE_MODEL, TEXT, stacked, tower
from .tiny import IMAGE, Family, everywhere, keeps_one_of, mixers, sliced

HYBRID_TYPES = ["linear_attention", "linear_attention", "full_attention"] * 2 + ["linear_attention"]
CONV_TYPES = ["conv", "full_attention", "conv", "conv", "full_attention", "conv", "conv"]
OTHERS_SLIDE = ["sliding_attention", "full_attention", "sliding_attention"] * 2 + ["full_attention"]
NO_GROUPS = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def over(model_type: str, base: dict[str, Any] = TEXT, **changes: Any) -> Callable[[], PreTrainedConfig]:
    """The config builder of LLaVA with another language model."""

    def config() -> PreTrainedConfig:
        return LlavaConfig(
            vision_config=tower("clip_vision_model"),
            text_config={"model_type": model_type, **base, **changes},
            image_token_index=IMAGE,
            image_seq_length=4,
        )

    return config


def family(model_type: str, config: Callable[[], PreTrainedConfig], **settings: Any) -> Family:
    stack = settings.pop("stack", LANGUAGE_MODEL)
    return Family(f"llava over {model_type}", config, stack, 7, stacked, (IMAGE,) * 4, **settings)


def _hybrid(types: list[str]) -> dict[str, Any]:
    attention = [layer for layer, kind in enumerate(types) if kind.endswith("attention") and layer not in mixers(types)]
    return {
        "may_refuse": everywhere("FB", mixers(types)),
        "possible": keeps_one_of(*attention),
        "saved_lists": sliced(layer_types=types),
    }


FAMILIES = (
    family("cohere", over("cohere", logit_scale=1.0)),
    family("exaone4", over("exaone4", sliding_window=6, sliding_window_pattern=3, layer_types=OTHERS_SLIDE)),
    family("gemma", over("gemma")),
    family("glm4", over("glm4")),
    family(
        "glm4_moe",
        over("glm4_moe", first_k_dense_replace=3, n_routed_experts=4, n_group=1, topk_group=1, **EXPERTS),
    ),
    family(
        "ernie4_5_moe",
        over("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=2),
    ),
    family("olmo2", over("olmo2")),
    family(
        "olmo3", over("olmo3", sliding_window=6, layer_types=OTHERS_SLIDE), saved_lists=sliced(layer_types=OTHERS_SLIDE)
    ),
    family("olmoe", over("olmoe", num_experts=4, num_experts_per_tok=2)),
    family("mixtral", over("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=6)),
    family("qwen2_moe", over("qwen2_moe", num_experts=4, decoder_sparse_step=3, **EXPERTS)),
    family(
        "qwen3_next",
        over(
            "qwen3_next",
            layer_types=HYBRID_TYPES,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            shared_expert_intermediate_size=16,
            mlp_only_layers=[1],
            **EXPERTS,
        ),
        tolerance=3e-4,
        **_hybrid(HYBRID_TYPES),
    ),
    family(
        "lfm2_moe",
        over("lfm2_moe", layer_types=CONV_TYPES, num_experts=4, num_dense_layers=2, **EXPERTS),
        **_hybrid(CONV_TYPES),
    ),
    family(
        "deepseek_v2",
        over(
            "deepseek_v2",
            NO_GROUPS,
            num_key_value_heads=4,
            kv_lora_rank=8,
            q_lora_rank=None,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=2,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            **EXPERTS,
        ),
    ),
    family(
        "opt", over("opt", NO_GROUPS, ffn_dim=48, word_embed_proj_dim=32), stack="model.language_model.decoder.layers"
    ),
    family("gpt_neox", over("gpt_neox", NO_GROUPS)),
    family("phi", over("phi")),
    family("starcoder2", over("starcoder2", sliding_window=6)),
    family("stablelm", over("stablelm")),
    family("apertus", over("apertus")),
    family("seed_oss", over("seed_oss")),
    family("hunyuan_v1_dense", over("hunyuan_v1_dense")),
    family("arcee", over("arcee")),
    family("nemotron", over("nemotron")),
    family("bitnet", over("bitnet")),
    family("helium", over("helium")),
)
