"""Train small models of other families: `python -m reference_training.train_families [NAME ...]`.

They serve to see whether what holds for the reference models holds elsewhere, and are trained where they are needed
rather than shipped. Tower and projector first learn to write what they see in the words of the untrained backbone
(`reference_training.words`), then the backbone is trained on easy-VQA or captions with packed sequences. The result
depends on the seed, the number of threads and the recipe alone. An interrupted run that is started again goes on from
its last saved state; a finished model is left as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from reference_training.data import easy_vqa_development_images, easy_vqa_training_images
from reference_training.model import build_model
from workers.models.cache import cache_directory
from workers.models.checkpoint import BUNDLED_MODELS, fingerprint_checkpoint
from workers.reference.build import place_eyes
from workers.reference.smollm2 import Eyes

from .batches import DevelopmentSet, development_captions, development_questions, easy_batches, scene_batches
from .families import FAMILIES, Family
from .optimisation import Optimiser, Schedule, save_state
from .packing import PackedBatch, Packer, packed_losses
from .recipe import Training
from .train import averaged_model, reference_processor, save_checkpoint
from .vision import label_easy_vqa
from .words import train_words

log = logging.getLogger(__name__)

RESULT = "training.json"
"""What is written beside a finished checkpoint: its recipe, fingerprint, development accuracy and seconds."""

DEVELOPMENT_CAPTIONS = 200
DEVELOPMENT_IMAGES = 60
"""How many of the images that are never trained on the accuracy is measured on."""

_REPORT_EVERY = 20
_AVERAGE_DECAY = 0.98
_EMBEDDINGS = "model.language_model.embed_tokens."
_EMBEDDING_SCALE = 10.0
_EMBEDDING_RATE = 0.1
"""Embeddings that the projector has learnt start long and move slowly, so that it still writes them later on."""


def untrained(family: Family, processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """A float32 model of random weights behind the first layers of the bundled model's tower."""
    model = build_model(processor.tokenizer, family.architecture, seed)
    bundled = LlavaForConditionalGeneration.from_pretrained(BUNDLED_MODELS / "llava-12", dtype=torch.float32)
    weights, own = bundled.model.vision_tower.state_dict(), model.model.vision_tower.state_dict()
    model.model.vision_tower.load_state_dict({name: weights[name] for name in own}, strict=True)
    return model


def _with_words(model: LlavaForConditionalGeneration, family: Family, processor: LlavaProcessor, file: Path) -> None:
    """Let tower and projector learn the backbone's words, or take what an earlier run has left in `file`."""
    if family.words is None:
        return
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(_EMBEDDING_SCALE)
    eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector)
    if not file.exists():
        embeddings = model.get_input_embeddings().weight.detach().clone()
        averaged = train_words(eyes, easy_vqa_training_images(), processor.tokenizer, embeddings, family.words)
        save_file({name: weight.contiguous() for name, weight in averaged.items()}, file)
        eyes.float()
    place_eyes(model, load_file(file))


def batches_of(training: Training, packer: Packer, first: int) -> Iterator[tuple[PackedBatch, torch.Tensor]]:
    """The batches of the task that is trained on, from step `first` on."""
    if training.scenes:
        return scene_batches(packer, training, first)
    images = easy_vqa_training_images()
    return easy_batches(images, label_easy_vqa(images), packer, training, first)


def development_of(training: Training, packer: Packer) -> DevelopmentSet:
    """Images of the same task that are never trained on."""
    if training.scenes:
        return development_captions(packer, training.seed, DEVELOPMENT_CAPTIONS)
    return development_questions(packer, easy_vqa_development_images()[:DEVELOPMENT_IMAGES])


def train_family(family: Family, output: Path, seed: int = 0) -> float:
    """Train one model, write ``output/checkpoint``, and return its share of right development answers.

    Each phase goes on from the averaged weights of the one before, with the next seed.
    """
    output.mkdir(parents=True, exist_ok=True)
    processor, accuracy = reference_processor(), 0.0
    model = untrained(family, processor, seed)
    _with_words(model, family, processor, output / "words.safetensors")
    for number, phase in enumerate(family.phases):
        training = replace(phase, seed=seed + number)
        log.info("phase %s", json.dumps(asdict(training)))
        model.float().train().model.vision_tower.requires_grad_(False)
        slow = {_EMBEDDINGS: _EMBEDDING_RATE} if family.words else {}
        model, accuracy = train_phase(model, processor, training, slow, output)
    return accuracy


def train_phase(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    training: Training,
    slow: Mapping[str, float],
    output: Path,
) -> tuple[LlavaForConditionalGeneration, float]:
    """Train a float32 model; returns the averaged one and its accuracy.

    Saves its state every `save_every` steps, and with it a checkpoint of the averaged weights.
    """
    packer, state_file = Packer(processor, model.config.image_seq_length), output / f"{training.name}.pt"
    schedule = Schedule(training.rate, training.warmup, training.steps, training.decay)
    optimiser = Optimiser(model, schedule, slow=slow, average_decay=_AVERAGE_DECAY)
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("going on from step %d", optimiser.step_number)
    development = development_of(training, packer)

    def checkpoint() -> tuple[LlavaForConditionalGeneration, float]:
        save_state(optimiser, state_file)
        finished = averaged_model(model, optimiser)
        save_checkpoint(finished, processor, output / "checkpoint")
        accuracy = development.accuracy(finished)
        log.info("step %d: %.4f of the development answers are right", optimiser.step_number, accuracy)
        return finished, accuracy

    losses, started = [], time.perf_counter()
    for batch, pixels in batches_of(training, packer, optimiser.step_number):
        loss, question_loss = packed_losses(model, batch, pixels)
        torch.autograd.backward(loss + training.question_weight * question_loss)
        optimiser.step()
        losses.append(loss.item())
        step = optimiser.step_number
        if step % _REPORT_EVERY == 0:
            seconds = (time.perf_counter() - started) / len(losses)
            log.info("step %d: loss %.4f, %.2f s a step", step, float(np.mean(losses)), seconds)
            losses, started = [], time.perf_counter()
        if step % training.save_every == 0 and step < training.steps:
            checkpoint()
    return checkpoint()


def build(name: str, directory: Path, seed: int) -> None:
    """Train a model by name in ``directory/name``, or leave a finished one as it is; logs its fingerprint."""
    output = directory / name
    result = output / RESULT
    if not result.exists():
        started = time.perf_counter()
        accuracy = train_family(FAMILIES[name], output, seed)
        found = {
            "fingerprint": fingerprint_checkpoint(output / "checkpoint"),
            "development_accuracy": round(accuracy, 4),
            "seconds": round(time.perf_counter() - started),
            "seed": seed,
            "threads": torch.get_num_threads(),
            "phases": [asdict(phase) for phase in FAMILIES[name].phases],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found = json.loads(result.read_text(encoding="utf-8"))
    log.info("%s: accuracy %.4f, fingerprint %s", name, found["development_accuracy"], found["fingerprint"])


def main(argv: list[str] | None = None) -> int:
    """Train the models named on the command line, one after another."""
    parser = argparse.ArgumentParser(prog="python -m reference_training.train_families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--output", type=Path, help="directory for all of them (default: families in SKIPPLAN_CACHE)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number is another model")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    unknown = sorted(set(options.names) - FAMILIES.keys())
    if unknown:
        parser.error(f"no model is named {unknown[0]}; there are {', '.join(FAMILIES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    for name in options.names or FAMILIES:
        build(name, options.output or cache_directory() / "families", options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
