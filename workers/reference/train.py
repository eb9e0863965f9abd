"""Train the reference model from random initialisation: `python -m workers.reference.train --output DIRECTORY`.

Stage 1 teaches the vision tower what each patch shows (`workers.reference.vision`). Stage 2, here, trains the whole
model on both tasks with packed sequences. The result depends on the seed and the options alone; an interrupted run that
is started again with the same options goes on from its last saved state.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from workers.reference.data import (
    CAPTION_PROMPT,
    CAPTION_PROMPTS,
    EasyVqaImage,
    easy_vqa_development_images,
    easy_vqa_training_images,
    read_pixels,
    training_scenes,
)
from workers.reference.model import Architecture, build_model
from workers.reference.optimisation import Optimiser, Schedule
from workers.reference.packing import PackedBatch, Packer, answer_loss, answers_right
from workers.reference.parallel import SecondHalf
from workers.reference.tokenizer import build_processor, task_text, train_tokenizer
from workers.reference.vision import (
    LabelledImages,
    VisionTraining,
    label_easy_vqa,
    label_scenes,
    shift_and_flip,
    to_input,
    train_vision,
)

log = logging.getLogger(__name__)

FIRST_PACKED_SCENE = 400_000
"""Stage 2 draws its scenes from here on; stage 1 draws below."""

FIRST_DEVELOPMENT_SCENE = 990_000
"""Scenes that neither stage trains on, for choices made during development."""

_REPORT_EVERY = 20


@dataclass(frozen=True)
class Training:
    """Stage 2: steps, what a step sees, and how fast it learns. Each step draws scenes never seen before."""

    steps: int = 2000
    easy_images: int = 24
    questions: int = 8
    scenes: int = 48
    rate: float = 1e-3
    tower_rate: float = 0.3
    other_wordings: float = 0.2
    save_every: int = 100
    seed: int = 0


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
            asked = rng.permutation(len(image.questions))[: training.questions]
            rows.append([packer.branch(image.questions[number], image.answers[number]) for number in asked])
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


def development_sets(packer: Packer, training: Training) -> dict[str, DevelopmentSet]:
    """Images that are never trained on: the last easy-VQA training images and 400 scenes."""
    images = easy_vqa_development_images()
    pixels = to_input(label_easy_vqa(images).pixels)
    easy = []
    for start in range(0, len(images), 25):
        rows = [
            [packer.branch(question, answer) for question, answer in zip(image.questions, image.answers, strict=True)]
            for image in images[start : start + 25]
        ]
        easy.append((packer.pack(rows, torch.bfloat16), pixels[start : start + 25]))
    scenes = []
    for start in range(FIRST_DEVELOPMENT_SCENE, FIRST_DEVELOPMENT_SCENE + 400, 50):
        drawn = training_scenes(start, 50, training.seed)
        rows = [[packer.branch(CAPTION_PROMPT, entry.caption)] for entry in drawn]
        pixels = to_input(read_pixels(entry.image for entry in drawn))
        scenes.append((packer.pack(rows, torch.bfloat16), pixels))
    return {"easy-vqa": DevelopmentSet(tuple(easy)), "scenes": DevelopmentSet(tuple(scenes))}


def reference_processor() -> LlavaProcessor:
    """The processor, its tokenizer trained on the task text."""
    return build_processor(train_tokenizer(task_text(easy_vqa_training_images())))


def scene_half(
    architecture: Architecture, training: Training, first_step: int
) -> tuple[LlavaForConditionalGeneration, Iterator[tuple[PackedBatch, torch.Tensor]]]:
    """What the second process needs: a model to place the shared weights in, and the scene batches."""
    processor = reference_processor()
    model = build_model(processor.tokenizer, architecture, training.seed)
    return model, scene_batches(Packer(processor, architecture.vision_tokens), training, first_step)


def train_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    training: Training,
    architecture: Architecture,
    output: Path,
    images: list[EasyVqaImage],
    development: Mapping[str, DevelopmentSet],
) -> dict[str, float]:
    """Stage 2. Saves its state every `save_every` steps and the finished checkpoint in `output`; returns accuracies."""
    packer = Packer(processor, architecture.vision_tokens)
    schedule = Schedule(training.rate, warmup=min(150, training.steps), total=training.steps)
    optimiser = Optimiser(model, schedule, slow={"model.vision_tower.": training.tower_rate})
    state_file = output / "state.pt"
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("going on from step %d", optimiser.step_number)
    first = optimiser.step_number
    batches = easy_batches(images, label_easy_vqa(images), packer, training, first)
    scenes = partial(scene_half, architecture, training, first)
    accuracy: dict[str, float] = {}
    losses: list[tuple[float, float]] = []
    model.train()
    with SecondHalf(model, scenes, torch.get_num_threads()) as second:
        started = time.perf_counter()
        for batch, pixels in batches:
            second.begin()
            loss = answer_loss(model, batch, pixels)
            torch.autograd.backward(loss)
            losses.append((loss.item(), second.finish()))
            optimiser.step()
            step = optimiser.step_number
            if step % _REPORT_EVERY == 0:
                easy, scene = np.mean(losses, axis=0)
                rate = (time.perf_counter() - started) / len(losses)
                log.info("step %d: loss easy-vqa %.4f, scenes %.4f, %.2f s a step", step, easy, scene, rate)
            if step % training.save_every == 0 or step == training.steps:
                _save_state(optimiser, state_file)
                finished = averaged_model(model, optimiser)
                save_checkpoint(finished, processor, output / "checkpoint")
                accuracy = {name: entry.accuracy(finished) for name, entry in development.items()}
                log.info("step %d: development accuracy %s", step, {k: round(v, 4) for k, v in accuracy.items()})
            if step % _REPORT_EVERY == 0:
                losses, started = [], time.perf_counter()
    return accuracy


def averaged_model(model: LlavaForConditionalGeneration, optimiser: Optimiser) -> LlavaForConditionalGeneration:
    """A copy of the model with the averaged weights, in bfloat16."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in result.named_parameters():
            weight.copy_(optimiser.averaged()[name])
    return result.eval()


def save_checkpoint(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write a plain Hugging Face checkpoint: weights, configuration, generation settings and processor."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _save_state(optimiser: Optimiser, file: Path) -> None:
    """Write the state beside its place first, so that an interruption leaves the earlier one whole."""
    unfinished = file.with_suffix(".unfinished")
    torch.save(optimiser.state(), unfinished)
    unfinished.replace(file)


def vision_tower_weights(training: VisionTraining, architecture: Architecture, output: Path) -> dict[str, torch.Tensor]:
    """Stage 1, or its result where an earlier run in `output` has finished it."""
    file = output / "vision.safetensors"
    if file.exists():
        log.info("taking the vision tower from %s", file)
        return load_file(file)
    development = {
        "easy-vqa": label_easy_vqa(easy_vqa_development_images()),
        "scenes": label_scenes(training_scenes(FIRST_DEVELOPMENT_SCENE, 400, training.seed)),
    }
    weights = train_vision(training, architecture, easy_vqa_training_images(), development)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return weights


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.reference.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for states, log and checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--vision-epochs", type=int, default=VisionTraining.epochs)
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--rate", type=float, default=Training.rate)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run both stages with the options of the command line."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    options.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    architecture = Architecture()
    vision = VisionTraining(epochs=options.vision_epochs, seed=options.seed)
    training = Training(steps=options.steps, rate=options.rate, seed=options.seed)
    described: dict[str, Any] = {"architecture": asdict(architecture), "vision": asdict(vision)}
    log.info("%s", json.dumps({**described, "training": asdict(training)}))
    tower = vision_tower_weights(vision, architecture, options.output)
    processor = reference_processor()
    model = build_model(processor.tokenizer, architecture, options.seed)
    model.model.vision_tower.load_state_dict(tower, strict=True)
    torch.set_num_threads(max(1, options.threads // 2))
    images = easy_vqa_training_images()
    development = development_sets(Packer(processor, architecture.vision_tokens), training)
    train_model(model, processor, training, architecture, options.output, images, development)
    return 0


if __name__ == "__main__":
    sys.exit(main())
