"""A SmolVLM around the 30-layer reference model's trained language model, its vision tower random and small.

llama.cpp computes no CLIP tower as it is, and its converter knows SmolLM2's tokenizer: so it can serve a trained
language model with images, whatever the model makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny_video_families
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration, SmolVLMConfig, SmolVLMForConditionalGeneration

TOKENS = [*tiny_video_families.SMOLVLM.values(), *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))]


def save(directory: Path, reference: Path) -> Path:
    """Write the checkpoint to ``directory``; ``reference`` is where smollm2-30 lies."""
    directory.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    tokenizer.add_tokens(sorted(set(TOKENS) - set(tokenizer.get_vocab())), special_tokens=True)
    for name, token in tiny_video_families.SMOLVLM.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(directory)
    for name, content in tiny_video_families.processor_files("smolvlm", tiles=True).items():
        (directory / name).write_text(json.dumps(content))
    template = (reference / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template.replace("<image>\n", "<image>"))
    trained = LlavaForConditionalGeneration.from_pretrained(reference, dtype=torch.float32)
    trained.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config=trained.config.text_config.to_dict() | {"vocab_size": len(tokenizer)},
            vision_config=tiny_video_families.TOWER | {"image_size": 32, "patch_size": 8},
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            tie_word_embeddings=True,
        )
    )
    model.model.text_model = trained.model.language_model
    model.tie_weights()
    projection, embeddings = model.model.connector.modality_projection.proj, model.get_input_embeddings()
    projection.weight.data.normal_(0.0, float(embeddings.weight.detach().std()) / projection.in_features**0.5)
    model.generation_config = trained.generation_config
    model.save_pretrained(directory)
    return directory
