"""Before the backbone is asked anything: teach tower and projector to write what is seen in the backbone's own words.

Every vision token becomes the token embedding of a word, the colour's in even columns of patches and the shape's in odd
ones, so that a frozen language model reads "red circle red circle ..." from the first step on. This costs no pass
through the backbone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from reference_training.data import EASY_VQA_SHAPES, EasyVqaImage
from workers.reference.smollm2 import PATCH_SIZE, Eyes
from workers.tasks.scenes import COLOURS, IMAGE_SIZE

from .optimisation import Optimiser, Schedule
from .vision import label_easy_vqa, shift_and_flip, to_input

log = logging.getLogger(__name__)

_REPORT_EVERY = 50


@dataclass(frozen=True)
class WordTraining:
    """How long and how fast: steps of `batch` images; the tower learns at `tower_rate` of the rate."""

    steps: int = 240
    batch: int = 48
    rate: float = 2e-3
    tower_rate: float = 0.5
    seed: int = 0


def word_embedding(word: str, tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> torch.Tensor:
    """The embedding `[hidden]` of a word within a sentence, the mean where it is several tokens."""
    numbers = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return embeddings[numbers].float().mean(0)


def word_targets(
    images: list[EasyVqaImage], tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor
) -> torch.Tensor:
    """What two neighbouring patches of each image shall become, `[images, 2, hidden]`: its colour, its shape."""
    words = {name: word_embedding(name, tokenizer, embeddings) for name in (*COLOURS, *EASY_VQA_SHAPES)}
    rows = []
    for image in images:
        shape, colour = image.shape_and_colour
        rows.append(torch.stack([words[colour], words[shape]]))
    return torch.stack(rows)


def train_words(
    eyes: Eyes,
    images: list[EasyVqaImage],
    tokenizer: PreTrainedTokenizerFast,
    embeddings: torch.Tensor,
    training: WordTraining,
) -> dict[str, torch.Tensor]:
    """Train tower and projector in place on images that tell shape and colour; returns the averaged weights."""
    told = [image for image in images if all(image.shape_and_colour)]
    labelled, targets = label_easy_vqa(told), word_targets(told, tokenizer, embeddings)
    scale = targets.var()
    side = IMAGE_SIZE // PATCH_SIZE
    schedule = Schedule(training.rate, warmup=20, total=training.steps, decay=0.4)
    slow = {"vision_tower.": training.tower_rate}
    optimiser = Optimiser(eyes, schedule, slow=slow, weight_decay=0.0, average_decay=0.95)
    rng = np.random.default_rng([training.seed, 5])
    for step in range(1, training.steps + 1):
        chosen = rng.choice(len(told), training.batch, replace=False)
        pixels = to_input(shift_and_flip(labelled.take(chosen), rng).pixels)
        expected = targets[chosen].repeat(1, side * side // 2, 1)
        loss = (eyes(pixels).float() - expected).square().mean() / scale
        torch.autograd.backward(loss)
        optimiser.step()
        if step % _REPORT_EVERY == 0 or step == training.steps:
            log.info("words, step %d: %.4f of the variance unexplained", step, loss.item())
    return optimiser.averaged()
