"""The small models of other families: what each is built like, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import Gemma3TextConfig, Olmo2Config, PhiConfig, Qwen2Config

from reference_training.model import Architecture

from .recipe import Training
from .words import WordTraining


@dataclass(frozen=True)
class Family:
    """A model behind the first layers of the bundled model's vision tower, and its training.

    words: what tower and projector learn before the backbone; without it the tower stays as it is. phases: of the
    backbone's and the projector's training, on easy-VQA or on captions, whichever they have images of.
    """

    architecture: Architecture
    phases: tuple[Training, ...]
    words: WordTraining | None = None

    @property
    def captions(self) -> bool:
        """Whether it is taught captions of scenes, and not easy-VQA."""
        return self.phases[0].scenes > 0


_SHARED = Training("easy-vqa", steps=0, rate=3e-3, warmup=30, decay=0.3, easy_images=8, scenes=0, save_every=50)
_EASY_VQA = (
    # The images' own questions: a quarter of them is open, and teaches to read shape and colour.
    replace(_SHARED, name="own-questions", steps=200, questions=5, balanced=False, question_weight=0.2),
    # Nearly all in balance: the own ones teach habits, which are right on most yes/no questions.
    replace(_SHARED, name="balanced", steps=700, questions=1, question_weight=0.5),
)


def _captions(steps: int, scenes: int) -> tuple[Training, ...]:
    training = Training(
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
    return (training,)


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
        _EASY_VQA,
        _WORDS,
    ),
    "phi-8": Family(
        Architecture(backbone=PhiConfig, vision_layers=5, text_width=112, text_layers=8, text_heads=4, text_inner=320),
        _EASY_VQA,
        _WORDS,
    ),
    "olmo2-14": Family(
        Architecture(
            backbone=Olmo2Config, vision_layers=3, text_width=96, text_layers=14, text_heads=4, text_inner=256
        ),
        _EASY_VQA,
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
