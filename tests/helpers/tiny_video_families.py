"""Checkpoints with random weights of families with processors of their own, as a hub would hold them.

The processor's files are written by hand, not by transformers: loading them is what is tested.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import tiny_llava
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast

LAYERS = 6
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
SMOLVLM = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
PATCHES = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
"""Those with a part for videos; ``gemma3`` has none."""


def save(directory: Path, family: str, sizes: dict[str, int] = SIZES, *, letters: bool = False) -> Path:
    """Write a checkpoint of a family, with tokenizer and processor; ``sizes`` are those of its text model.

    ``letters``: for llama.cpp, whose converter knows a tokenizer in the manner of Llama 2 without a table of its own;
    this one has a token for every letter and byte. SmolVLM's images are cut into four tiles, as that engine does.
    """
    directory.mkdir(parents=True)
    tokens, picture = {
        "smolvlm": (SMOLVLM, "<image>"),
        "internvl": (INTERNVL, "<IMG_CONTEXT>"),
        "gemma3": (GEMMA3, "<start_of_image>"),
    }.get(family, (QWEN, "<|vision_start|><|image_pad|><|vision_end|>"))
    tokenizer = _tokenizer(tokens, _letters() if letters else tiny_llava.build_processor().tokenizer)
    if letters and family == "smolvlm":
        tokenizer.add_tokens([f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)], special_tokens=True)
        tokenizer.add_tokens(["\n\n"])
    if family == "gemma3":
        tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # which its processor in vLLM asks for
    tokenizer.save_pretrained(directory)
    for name, content in processor_files(family, tiles=letters).items():
        (directory / name).write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(tiny_llava.CHAT_TEMPLATE.replace("<image>\n", picture))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(family, tokenizer, sizes))
    model.generation_config.eos_token_id = None  # every answer has its full length
    if letters:  # no answers of bytes and special tokens, for which programs write different signs
        words = tokenizer.get_vocab().items()
        model.lm_head.weight.data[[number for word, number in words if len(word) > 1]] = 0.0
    model.save_pretrained(directory)
    return directory


def _letters() -> PreTrainedTokenizerFast:
    """Build a tokenizer of letters, with bytes for other characters; without merges a text is cut in one way."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]
    model = models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _tokenizer(tokens: dict[str, str], plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    plain.add_tokens(sorted(set(tokens.values())), special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=tokens,
    )


def processor_files(family: str, *, tiles: bool) -> dict[str, dict[str, Any]]:
    """Return the files of a family's processor; ``tiles``: SmolVLM's images are cut into four."""
    if family == "smolvlm":
        images = {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 64 if tiles else 32},
            "max_image_size": {"longest_edge": 32},
            "do_image_splitting": tiles,
        }
        return {
            "preprocessor_config.json": {"processor_class": "SmolVLMProcessor"} | images,
            "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        }
    if family == "internvl":
        images = {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 32, "width": 32},
            "crop_to_patches": False,
        }
        return {
            "preprocessor_config.json": {"processor_class": "InternVLProcessor"} | images,
            "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", "num_frames": 3},
            "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        }
    if family == "gemma3":
        images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}}
        return {
            "preprocessor_config.json": {"processor_class": "Gemma3Processor"} | images,
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        }
    name = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
    }[family]
    images = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 256, "max_pixels": 1024}
    return {"preprocessor_config.json": {"processor_class": name} | images | PATCHES}


def _config(family: str, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int]) -> Any:
    def number(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)))

    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # large enough that plans change the answers
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": None,
    }
    if family == "smolvlm":
        return CONFIG_MAPPING[family](
            text_config={"model_type": "llama"} | text,
            vision_config=TOWER | {"image_size": 32, "patch_size": 8},
            image_token_id=number("image_token"),
            scale_factor=2,
        )
    if family == "internvl":
        return CONFIG_MAPPING[family](
            text_config={"model_type": "qwen2"} | text,
            vision_config=TOWER | {"image_size": (32, 32), "patch_size": (8, 8)},
            image_token_id=number("context_image_token"),
            image_seq_length=4,
        )
    if family == "gemma3":
        head = sizes["hidden_size"] // sizes["num_attention_heads"]
        return CONFIG_MAPPING[family](
            text_config=text | {"head_dim": head, "sliding_window": 16, "sliding_window_pattern": 3},
            vision_config=TOWER | {"image_size": 32, "patch_size": 8},
            mm_tokens_per_image=4,
            image_token_id=number("image_token"),
            boi_token_index=number("boi_token"),
            eoi_token_index=number("eoi_token"),
        )
    hidden = sizes["hidden_size"]
    head = hidden // sizes["num_attention_heads"]
    sections = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    grid = {"depth": 2, "num_heads": 2, "patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2}
    own = {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": hidden,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    }[family]
    ids = {f"{name}_id": number(name) for name in QWEN}
    if family == "qwen3_vl":
        text |= {"head_dim": head}
    return CONFIG_MAPPING[family](text_config=text | {"rope_parameters": mrope}, vision_config=grid | own, **ids)
