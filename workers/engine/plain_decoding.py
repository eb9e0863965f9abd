"""Whether generation does nothing but take the most likely token until the end."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin

from workers.layerwise.decoder import NotExactError

UNTOUCHED_LOGITS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),
    "watermarking_config": (),
    "stop_strings": (),
    "max_time": (),
}
"""Generation settings, and the values under which greedy decoding takes the most likely token until the end."""


def require_plain_decoding(model: Any) -> None:
    """Raise NotExactError where generation does more than take the most likely token."""
    config = model.generation_config
    for name, harmless in UNTOUCHED_LOGITS.items():
        value = getattr(config, name, None)
        if value is not None and value not in harmless:
            raise NotExactError(f"its generation settings change logits ({name} = {value!r})")
    if type(model).generate is not GenerationMixin.generate:
        raise NotExactError("it generates by a method of its own")
