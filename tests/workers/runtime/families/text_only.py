"""Language models without pictures: plans of R and S; freeze and bypass have no vision token to act on."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3nTextConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from .picture_towers import TEXT
from .tiny import Family, everywhere, sliced
from .uneven_stacks import KV_PROVIDERS_3N, gemma3n_lists, gemma3n_text

STACK = "model.layers"
QWEN3_TYPES = ["full_attention", "sliding_attention"] * 3 + ["sliding_attention"]


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**TEXT)


def _qwen3() -> PreTrainedConfig:
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    return Qwen3Config(**{**TEXT, "tie_word_embeddings": True}, layer_types=QWEN3_TYPES, **sliding)


def _mistral() -> PreTrainedConfig:
    return MistralConfig(**TEXT, sliding_window=6)


def _gemma3n_text() -> PreTrainedConfig:
    return Gemma3nTextConfig(**{key: value for key, value in gemma3n_text().items() if key != "model_type"})


NOTHING_TO_FREEZE = everywhere("FB", range(8))

FAMILIES = (
    Family("llama", _llama, STACK, 7, vision_ids=frozenset(), may_refuse=NOTHING_TO_FREEZE),
    Family(
        "qwen3",
        _qwen3,
        STACK,
        7,
        vision_ids=frozenset(),
        may_refuse=NOTHING_TO_FREEZE,
        saved_lists=sliced(layer_types=QWEN3_TYPES),
    ),
    Family("mistral", _mistral, STACK, 7, vision_ids=frozenset(), may_refuse=NOTHING_TO_FREEZE),
    Family(
        "gemma3n_text",
        _gemma3n_text,
        STACK,
        8,
        vision_ids=frozenset(),
        refused=KV_PROVIDERS_3N,
        may_refuse=NOTHING_TO_FREEZE,
        saved_lists=gemma3n_lists,
    ),
)
