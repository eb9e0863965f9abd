"""Join a small trained vision tower and projector to a language model: the 30-layer reference LLaVA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from workers.reference.language import LanguageModel
from workers.tasks.scenes import IMAGE_SIZE

PATCH_SIZE = 8
"""Width and height of a vision patch in pixels."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ 'Answer: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nAnswer:' }}{% endif %}"
)
"""SmolLM2's own turns without its system message; the answer follows "Answer:" with a space, then `<|im_end|>`."""


@dataclass(frozen=True)
class VisionArchitecture:
    """Sizes of the vision tower; the defaults are the shipped ones."""

    vision_width: int = 128
    vision_layers: int = 6
    vision_heads: int = 4
    vision_inner: int = 512

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of an image: one for each patch."""
        return (IMAGE_SIZE // PATCH_SIZE) ** 2


def vision_config(architecture: VisionArchitecture) -> CLIPVisionConfig:
    """Return the configuration of the vision tower alone."""
    return CLIPVisionConfig(
        hidden_size=architecture.vision_width,
        intermediate_size=architecture.vision_inner,
        num_hidden_layers=architecture.vision_layers,
        num_attention_heads=architecture.vision_heads,
        projection_dim=architecture.vision_width,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


class Eyes(nn.Module):
    """The two trained parts of a LLaVA: the vision tower and the projector."""

    def __init__(self, vision_tower: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vision tokens `[images, patches, hidden]` of pixels `[images, 3, height, width]`."""
        states = self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        tokens: torch.Tensor = self.multi_modal_projector(states)
        return tokens


def smollm2_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Join the tokenizer and a Pillow-backed CLIP image processor (no torchvision needed) to a LLaVA processor."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def join(language: LanguageModel, architecture: VisionArchitecture, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build a LLaVA around the language model; tower and projector are random, in bfloat16 like the backbone."""
    text = language.model.config
    config = LlavaConfig(
        vision_config=vision_config(architecture),
        text_config=text,
        image_token_index=language.tokenizer.image_token_id,
        image_seq_length=architecture.vision_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        attn_implementation="eager",
        dtype=torch.bfloat16,
    )
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = type(model.model.vision_tower)(config.vision_config).to(torch.bfloat16)
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config).to(torch.bfloat16)
    model.model.language_model = language.model.model
    model.lm_head = language.model.lm_head
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=32,
    )
    return model
