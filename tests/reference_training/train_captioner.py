"""Train a third model that nothing is tuned on: `python -m reference_training.train_captioner --output DIRECTORY`.

A LLaVA of another family and shape than the shipped ones (`reference_training.model.CAPTIONER`), taught to caption
scenes behind the bundled model's vision tower, which stays as it is. Backbone and projector start from random weights.
It is trained where it is needed rather than shipped: to see whether what holds for the reference models holds
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from reference_training.data import CAPTION_PROMPT, read_pixels, training_scenes
from reference_training.model import CAPTIONER, build_model
from workers.models.checkpoint import BUNDLED_MODELS

from .batches import FIRST_DEVELOPMENT_SCENE, DevelopmentSet, scene_batches
from .optimisation import Optimiser, Schedule
from .packing import Packer, answer_scores
from .recipe import Training
from .train import averaged_model, reference_processor, save_checkpoint
from .vision import to_input

log = logging.getLogger(__name__)

RECIPE = Training("captions", steps=600, rate=2e-3, warmup=60, decay=0.4, scenes=40, other_wordings=0.0, save_every=100)
_REPORT_EVERY = 20


def development_scenes(packer: Packer, seed: int, count: int = 200) -> DevelopmentSet:
    """Scenes that are never trained on, in float32."""
    batches = []
    for start in range(FIRST_DEVELOPMENT_SCENE, FIRST_DEVELOPMENT_SCENE + count, 50):
        drawn = training_scenes(start, 50, seed)
        rows = [[packer.branch(CAPTION_PROMPT, entry.caption)] for entry in drawn]
        pixels = to_input(read_pixels(entry.image for entry in drawn)).float()
        batches.append((packer.pack(rows, torch.float32), pixels))
    return DevelopmentSet(tuple(batches))


def train_captioner(output: Path, training: Training) -> float:
    """Train in float32, write ``output/checkpoint``, and return its share of exact captions of development scenes."""
    processor = reference_processor()
    model = build_model(processor.tokenizer, CAPTIONER, training.seed)
    bundled = LlavaForConditionalGeneration.from_pretrained(BUNDLED_MODELS / "llava-12", dtype=torch.float32)
    model.model.vision_tower.load_state_dict(bundled.model.vision_tower.state_dict(), strict=True)
    model.model.vision_tower.requires_grad_(False)
    packer = Packer(processor, CAPTIONER.vision_tokens)
    schedule = Schedule(training.rate, training.warmup, training.steps, training.decay)
    optimiser = Optimiser(model, schedule, average_decay=0.99, dtype=torch.float32)
    development = development_scenes(packer, training.seed)
    accuracy, losses, started = 0.0, [], time.perf_counter()
    for batch, pixels in scene_batches(packer, training, 0):
        batch = replace(batch, mask=batch.mask.float())
        loss = functional.cross_entropy(*answer_scores(model, batch, pixels.float()))
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.item())
        step = optimiser.step_number
        if step % _REPORT_EVERY == 0:
            seconds = (time.perf_counter() - started) / len(losses)
            log.info("step %d: loss %.4f, %.2f s a step", step, float(np.mean(losses)), seconds)
            losses, started = [], time.perf_counter()
        if step % training.save_every == 0 or step == training.steps:
            finished = averaged_model(model, optimiser)
            save_checkpoint(finished, processor, output / "checkpoint")
            accuracy = development.accuracy(finished)
            log.info("step %d: %.4f of the development captions are exact", step, accuracy)
            losses, started = [], time.perf_counter()
    return accuracy


def main(argv: list[str] | None = None) -> int:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference_training.train_captioner", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for log and checkpoint")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    options.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    training = replace(RECIPE, steps=options.steps, seed=options.seed)
    log.info("captions: %s", json.dumps(asdict(training)))
    train_captioner(options.output, training)
    return 0


if __name__ == "__main__":
    sys.exit(main())
