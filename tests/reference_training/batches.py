"""The batches of stage 2: easy-VQA images with their questions and scenes with their captions, packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from reference_training.data import (
    CAPTION_PROMPT,
    CAPTION_PROMPTS,
    EasyVqaImage,
    YesNoQuestions,
    easy_vqa_development_images,
    read_pixels,
    training_scenes,
)

from .packing import PackedBatch, Packer, answers_right
from .recipe import Training
from .vision import LabelledImages, label_easy_vqa, shift_and_flip, to_input

FIRST_PACKED_SCENE = 400_000
"""Stage 2 draws its scenes from here on; stage 1 draws below."""

FIRST_DEVELOPMENT_SCENE = 990_000
"""Scenes that neither stage trains on, for choices made during development."""


@dataclass(frozen=True)
class DevelopmentSet:
    """Packed batches of one task with the images' pixels, for measuring during training."""

    batches: tuple[tuple[PackedBatch, torch.Tensor], ...]

    def accuracy(self, model: LlavaForConditionalGeneration) -> float:
        """Share of the answers that the model would decode exactly."""
        counts = [answers_right(model, batch, pixels) for batch, pixels in self.batches]
        return sum(right for right, _ in counts) / sum(total for _, total in counts)


def easy_batches(
    images: list[EasyVqaImage], labelled: LabelledImages, packer: Packer, training: Training, first_step: int
) -> Iterator[tuple[PackedBatch, torch.Tensor]]:
    """One batch of easy-VQA images with their questions for each step from `first_step` on."""
    bank = YesNoQuestions(images)
    steps_per_epoch = len(images) // training.easy_images
    order = np.zeros(0, dtype=np.int64)
    for step in range(first_step, training.steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or step == first_step:
            order = np.random.default_rng([training.seed, 2, epoch]).permutation(len(images))
        rng = np.random.default_rng([training.seed, 3, step])
        chosen = order[place * training.easy_images : (place + 1) * training.easy_images]
        rows = []
        for position in chosen:
            image = images[position]
            own = rng.permutation(len(image.questions))[: training.questions]
            pairs = [(image.questions[number], image.answers[number]) for number in own]
            if training.balanced:
                pairs += bank.balanced(image, rng)
            rows.append([packer.branch(*pair) for pair in pairs])
        moved = shift_and_flip(labelled.take(chosen), rng)
        yield packer.pack(rows, torch.bfloat16), to_input(moved.pixels)


def scene_batches(packer: Packer, training: Training, first_step: int) -> Iterator[tuple[PackedBatch, torch.Tensor]]:
    """One batch of fresh scenes with their captions for each step from `first_step` on."""
    for step in range(first_step, training.steps):
        rng = np.random.default_rng([training.seed, 4, step])
        drawn = training_scenes(FIRST_PACKED_SCENE + step * training.scenes, training.scenes, training.seed)
        rows = []
        for entry in drawn:
            other = rng.random() < training.other_wordings
            prompt = CAPTION_PROMPTS[rng.integers(1, len(CAPTION_PROMPTS))] if other else CAPTION_PROMPT
            rows.append([packer.branch(prompt, entry.caption)])
        yield packer.pack(rows, torch.bfloat16), to_input(read_pixels(entry.image for entry in drawn))


def development_questions(packer: Packer, images: list[EasyVqaImage]) -> DevelopmentSet:
    """All questions of some easy-VQA images that are never trained on."""
    pixels = to_input(label_easy_vqa(images).pixels)
    batches = []
    for start in range(0, len(images), 10):
        rows = [
            [packer.branch(question, answer) for question, answer in zip(image.questions, image.answers, strict=True)]
            for image in images[start : start + 10]
        ]
        batches.append((packer.pack(rows, torch.bfloat16), pixels[start : start + 10]))
    return DevelopmentSet(tuple(batches))


def development_captions(packer: Packer, seed: int, count: int) -> DevelopmentSet:
    """The captions of `count` scenes that are never trained on."""
    batches = []
    for start in range(FIRST_DEVELOPMENT_SCENE, FIRST_DEVELOPMENT_SCENE + count, 50):
        drawn = training_scenes(start, 50, seed)
        rows = [[packer.branch(CAPTION_PROMPT, entry.caption)] for entry in drawn]
        pixels = to_input(read_pixels(entry.image for entry in drawn))
        batches.append((packer.pack(rows, torch.bfloat16), pixels))
    return DevelopmentSet(tuple(batches))


def development_sets(packer: Packer, seed: int) -> dict[str, DevelopmentSet]:
    """Images that are never trained on: the last easy-VQA training images and 400 scenes."""
    return {
        "easy-vqa": development_questions(packer, easy_vqa_development_images()),
        "scenes": development_captions(packer, seed, 400),
    }
