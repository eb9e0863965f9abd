"""Train the reference model from random initialisation: `python -m reference_training.train --output DIRECTORY`.

Stage 1 teaches the vision tower what each patch shows (`reference_training.vision`). Stage 2, here, trains the whole
model on both tasks with packed sequences, in the phases of `reference_training.recipe`. The result depends on the seed,
the number of threads and the recipe alone; an interrupted run that is started again goes on from its last saved state.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from reference_training.data import (
    EasyVqaImage,
    easy_vqa_development_images,
    easy_vqa_training_images,
    training_scenes,
)
from reference_training.model import Architecture, build_model
from reference_training.tokenizer import build_processor, task_text, train_tokenizer

from .batches import FIRST_DEVELOPMENT_SCENE, DevelopmentSet, development_sets, easy_batches, scene_batches
from .optimisation import Optimiser, Schedule, save_state
from .packing import PackedBatch, Packer, packed_losses
from .parallel import SecondHalf
from .recipe import RECIPE, Training, VisionTraining
from .vision import label_easy_vqa, label_scenes, train_vision

log = logging.getLogger(__name__)

_REPORT_EVERY = 20


def reference_processor() -> LlavaProcessor:
    """The processor, its tokenizer trained on the task text."""
    return build_processor(train_tokenizer(task_text(easy_vqa_training_images())))


def second_half(
    architecture: Architecture, training: Training, first_step: int
) -> tuple[LlavaForConditionalGeneration, Iterator[tuple[PackedBatch, torch.Tensor]]]:
    """What the second process needs: a model to place the shared weights in, and its batches."""
    processor = reference_processor()
    model = build_model(processor.tokenizer, architecture, training.seed)
    packer = Packer(processor, architecture.vision_tokens)
    if training.scenes:
        return model, scene_batches(packer, training, first_step)
    images = easy_vqa_training_images()
    other = replace(training, seed=training.seed + 1_000_000)
    return model, easy_batches(images, label_easy_vqa(images), packer, other, first_step)


def train_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    training: Training,
    architecture: Architecture,
    output: Path,
    images: list[EasyVqaImage],
    development: Mapping[str, DevelopmentSet],
) -> dict[str, float]:
    """One phase of stage 2; returns the accuracies measured at its end.

    Saves its state every `save_every` steps, and with it a checkpoint of the averaged weights, in `output`.
    """
    packer = Packer(processor, architecture.vision_tokens)
    schedule = Schedule(training.rate, training.warmup, training.steps, training.decay)
    optimiser = Optimiser(model, schedule, slow={"model.vision_tower.": training.tower_rate})
    state_file = output / "state.pt"
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("going on from step %d", optimiser.step_number)
    first = optimiser.step_number
    if first == training.steps:
        return {}
    batches = easy_batches(images, label_easy_vqa(images), packer, training, first)
    build = partial(second_half, architecture, training, first)
    accuracy: dict[str, float] = {}
    losses: list[tuple[float, float]] = []
    task = "scenes" if training.scenes else "easy-vqa"
    model.train()
    with SecondHalf(model, build, torch.get_num_threads()) as second:
        started = time.perf_counter()
        for batch, pixels in batches:
            second.begin()
            loss, question_loss = packed_losses(model, batch, pixels)
            torch.autograd.backward(loss + training.question_weight * question_loss)
            losses.append((loss.item(), second.finish()))
            optimiser.step()
            step = optimiser.step_number
            if step % _REPORT_EVERY == 0:
                own, other = np.mean(losses, axis=0)
                rate = (time.perf_counter() - started) / len(losses)
                log.info("step %d: losses %.4f (easy-vqa), %.4f (%s), %.2f s a step", step, own, other, task, rate)
            if step % training.save_every == 0 or step == training.steps:
                save_state(optimiser, state_file)
                finished = averaged_model(model, optimiser)
                save_checkpoint(finished, processor, output / "checkpoint")
                accuracy = {name: entry.accuracy(finished) for name, entry in development.items()}
                log.info("step %d: development accuracy %s", step, {k: round(v, 4) for k, v in accuracy.items()})
            if step % _REPORT_EVERY == 0:
                losses, started = [], time.perf_counter()
    return accuracy


def averaged_model(model: LlavaForConditionalGeneration, optimiser: Optimiser) -> LlavaForConditionalGeneration:
    """A copy of the model with the averaged weights of what is trained, in the dtype that it computes in."""
    result = copy.deepcopy(model)
    weights = dict(result.named_parameters())
    with torch.no_grad():
        for name, average in optimiser.averaged().items():
            weights[name].copy_(average)
    return result.eval()


def save_checkpoint(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write a plain Hugging Face checkpoint: weights, configuration, generation settings and processor."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


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


def train_recipe(
    recipe: Sequence[Training],
    architecture: Architecture,
    processor: LlavaProcessor,
    tower: Mapping[str, torch.Tensor],
    output: Path,
    seed: int,
) -> Path:
    """All phases of stage 2, each in a directory of its own; returns the last one's checkpoint."""
    images = easy_vqa_training_images()
    development = development_sets(Packer(processor, architecture.vision_tokens), seed)
    checkpoint: Path | None = None
    for number, phase in enumerate(recipe):
        training = replace(phase, seed=seed + number)
        directory = output / f"{number + 1}-{phase.name}"
        directory.mkdir(exist_ok=True)
        log.info("phase %s: %s", directory.name, json.dumps(asdict(training)))
        if checkpoint is None:
            model = build_model(processor.tokenizer, architecture, seed)
            model.model.vision_tower.load_state_dict(tower, strict=True)
        else:
            # Loaded as saved: the dtype asked for would be written into the next checkpoint's configuration.
            model = LlavaForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").float()
        train_model(model, processor, training, architecture, directory, images, development)
        checkpoint = directory / "checkpoint"
    if checkpoint is None:
        raise ValueError("the recipe has no phases; it needs at least one")
    return checkpoint


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reference_training.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for states, log and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run both stages with the options of the command line."""
    options = _arguments(sys.argv[1:] if argv is None else argv)
    options.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    architecture = Architecture()
    torch.set_num_threads(options.threads)
    tower = vision_tower_weights(VisionTraining(seed=options.seed), architecture, options.output)
    torch.set_num_threads(max(1, options.threads // 2))
    processor = reference_processor()
    finished = train_recipe(RECIPE, architecture, processor, tower, options.output, options.seed)
    log.info("finished: %s", finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())
