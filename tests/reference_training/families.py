"""The small models of other families: what each is built like, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Gemma3TextConfig, Olmo2Config, PhiConfig, Qwen2Config

from reference_training.model import Architecture

from .recipe import Training
from .words import WordTraining


@dataclass(frozen=True)
class Family:
    """A model behind the first layers of the bundled model's vision tower, and its training.

    words: what tower and projector learn before the backbone; without it the tower stays as it is. training: of the
    backbone and the projector, on easy-VQA or on captions, whichever it has images of.
    """

    architecture: Architecture
    training: Training
    words: WordTraining | None = None

    @property
    def captions(self) -> bool:
        """Whether it is taught captions of scenes, and not easy-VQA."""
        return self.training.scenes > 0


def _easy_vqa(steps: int, rate: float = 3e-3) -> Training:
    """Nearly all questions in balance: the images' own ones teach habits, which are right on 87 % of them."""
    return Training(
        "easy-vqa",
        steps,
        rate,
        warmup=30,
        decay=0.25,
        easy_images=8,
        questions=1,
        scenes=0,
        question_weight=0.5,
        save_every=50,
    )


def _captions(steps: int, scenes: int) -> Training:
    return Training(
        "captions",
        steps,
        rate=2e-3,
        warmup=60,
        decay=0.4,
        easy_images=0,
        scenes=scenes,
        other_wordings=0.0,
        save_every=50,
    )


_WORDS = WordTraining(steps=120, batch=32)

FAMILIES = {
    "qwen2-10": Family(
        Architecture(
            backbone=Qwen2Config,
            vision_layers=4,
            text_width=96,
            text_layers=10,
            text_heads=4,
            text_key_value_heads=2,
            text_inner=256,
            scaled_norms=True,
        ),
        _easy_vqa(600),
        _WORDS,
    ),
    "phi-8": Family(
        Architecture(backbone=PhiConfig, vision_layers=5, text_width=112, text_layers=8, text_heads=4, text_inner=320),
        _easy_vqa(600),
        _WORDS,
    ),
    "olmo2-14": Family(
        Architecture(
            backbone=Olmo2Config, vision_layers=3, text_width=96, text_layers=14, text_heads=4, text_inner=256
        ),
        _easy_vqa(600),
        _WORDS,
    ),
    "gemma3-12": Family(
        Architecture(
            backbone=Gemma3TextConfig,
            text_width=96,
            text_layers=12,
            text_heads=4,
            text_key_value_heads=1,
            text_inner=256,
            text_settings={"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 512},
        ),
        _captions(400, scenes=24),
    ),
    "captioner": Family(
        Architecture(
            backbone=Qwen2Config,
            text_width=128,
            text_layers=16,
            text_heads=4,
            text_key_value_heads=2,
            text_inner=384,
        ),
        _captions(400, scenes=40),
    ),
}
"""By name: the backbone's family and its decoder layers; `captioner` was the first of them."""
