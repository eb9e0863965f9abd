"""Stage 1 of the four-task eyes: tower and projector learn to write the answers into the vision tokens.

The 64 vision tokens are slots in reading order. Those of a scene spell the questions that are asked about it with their
answers, those of a rendered text its question and answer, in the backbone's own token embeddings; so the frozen
language model finds each answer behind its question and only has to copy it. What a slot holds never moves: "above" is
said twice, as "left of" has two words, and shorter captions end in line breaks. Images of easy-VQA keep the vision
tokens that the shipped `smollm2-30` gives. No pass through the backbone is needed.

More losses on layers in the middle of the tower make it tell, at every patch, first what stands there (shape, colour,
character), then which one it is in reading order (the place of the shape or character, and whether the shapes are in a
row or a column). Their heads are thrown away.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from reference_training.data import read_pixels, training_scenes
from workers.reference.smollm2 import PATCH_SIZE, Eyes
from workers.tasks import rendered
from workers.tasks.rendered import WORDS, RenderedText, rendered_text
from workers.tasks.scenes import COLOURS, IMAGE_SIZE, QUESTIONS, RELATIONS, SHAPES, Scene

from .optimisation import Optimiser, Schedule, save_state
from .train_smollm2 import save_eyes
from .vision import (
    COLOUR_LABELS,
    SHAPE_LABELS,
    LabelledImages,
    classification_loss,
    label_scenes,
    patch_labels,
    shift_and_flip,
    to_input,
)

log = logging.getLogger(__name__)

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
SIDE = IMAGE_SIZE // PATCH_SIZE
SLOTS = SIDE * SIDE
FIRST_REFRESHED = 700_000
"""Scenes and texts from here on keep the slots in training while the backbone is asked."""

FIRST_DEVELOPMENT_INDEX = 990_000
"""Scenes and texts from here on are never trained on, for choices made during development."""

PLACE_LABELS = ("nothing", *((relation, place) for relation in RELATIONS for place in range(3)))
_MOST_CHARACTERS = 4
_NAMING_LAYER, _PLACING_LAYER = 4, 6
_RARE = -5.0
_SHARPNESS = 16.0
_LONGEST = 4.0
"""Norm above which a vision token is shortened; those of SmolLM2's embeddings are near 2.5."""

_REPORT_EVERY = 50
DEVELOPMENT = 300


@dataclass(frozen=True)
class SlotPhase:
    """Weights of the losses from a step on: scenes, texts, easy-VQA, patches of scenes, patches of texts.

    bounded: whether vision tokens that are much too long pull no more than others.
    """

    first_step: int
    weights: tuple[float, float, float, float, float]
    bounded: bool


PHASES = (
    SlotPhase(0, (1.0, 1.0, 1.0, 0.3, 0.5), bounded=False),
    # Those of easy-VQA are six times as long as embeddings; taken for such, a scene outweighed all the rest.
    SlotPhase(1500, (1.0, 2.0, 0.1, 1.0, 1.5), bounded=True),
    SlotPhase(2500, (1.0, 2.0, 0.3, 1.0, 1.5), bounded=True),
)


@dataclass(frozen=True)
class SlotTraining:
    """How long and how fast: steps of `scenes`, `texts` and `easy_images` images."""

    steps: int = 4800
    scenes: int = 28
    texts: int = 28
    easy_images: int = 8
    rate: float = 1.2e-3
    warmup: int = 100
    decay: float = 0.4
    save_every: int = 500
    seed: int = 0


class SlotWriter:
    """Spells scenes and texts as the entries of a small vocabulary of token embeddings, one for each slot.

    `embeddings`: `[entries, hidden]`, the entries' vectors; of a word of several tokens their mean.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, embeddings: torch.Tensor) -> None:
        self._tokenizer = tokenizer
        self._table = embeddings.float()
        self._numbers: dict[str, int] = {}
        self._vectors: list[torch.Tensor] = []
        # The vocabulary is everything that can be spelled, so that its size does not depend on what was.
        for entry in ("\n", " above", " left", " of", " ", *"0123456789"):
            self._entry(entry)
        for word in (*COLOURS, *SHAPES, *WORDS):
            self._entry(f" {word}")
        for name in QUESTIONS:
            self._text(
                f"{QUESTIONS[name].prompt}\nAnswer: There are two three shapes in a row column, from left top to"
            )
        self._text(" right bottom. The first is")
        self._text(f"{rendered.PROMPT}\nAnswer:")
        self.embeddings = torch.stack(self._vectors)

    def _entry(self, text: str) -> int:
        """Number of a text that fills one slot; adds it where it is new."""
        if text not in self._numbers:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            self._numbers[text] = len(self._vectors)
            self._vectors.append(self._table[tokens].mean(0))
        return self._numbers[text]

    def _text(self, text: str) -> list[int]:
        """Numbers of a text's tokens, each in a slot of its own."""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self._entry(self._tokenizer.decode([token])) for token in tokens]

    def _phrase(self, colour: str, shape: str) -> list[int]:
        return [self._entry(" a"), self._entry(f" {colour}"), self._entry(f" {shape}")]

    def scene(self, drawn: Scene) -> list[int]:
        """The 64 entries of a scene: its count, the beginning of its description, its caption."""
        count = QUESTIONS["count"]
        slots = self._text(f"{count.prompt}\nAnswer: {count.answer(drawn)}\n")
        opening = QUESTIONS["description"].answer(drawn).split(".")[0]
        slots += self._text(f"{QUESTIONS['description'].prompt}\nAnswer: {opening}. The first is")
        first = drawn.shapes[0]
        slots += [*self._phrase(first.colour, first.shape), *self._text(".\n")]
        slots += self._text(f"{QUESTIONS['caption'].prompt}\nAnswer:")
        for place, shape in enumerate(drawn.shapes):
            if place:
                slots += self._relation(drawn.relation)
            slots += self._phrase(shape.colour, shape.shape)
        return self._filled(slots)

    def _relation(self, relation: str) -> list[int]:
        """Two slots for either relation, so that what follows stays where it is."""
        return [self._entry(f" {word}") for word in (relation.split() * 2)[:2]]

    def text(self, drawn: RenderedText) -> list[int]:
        """The 64 entries of a rendered text: three times the question with the answer, then line breaks."""
        once = self._text(f"{rendered.PROMPT}\nAnswer:")
        if drawn.text.isdigit():
            answer = [self._entry(" "), *(self._entry(digit) for digit in drawn.text)]
        else:
            answer = [self._entry(f" {drawn.text}")]
        answer += [self._entry("\n")] * (6 - len(answer))
        return self._filled((once + answer) * 3)

    def _filled(self, slots: list[int]) -> list[int]:
        if len(slots) > SLOTS:
            raise ValueError(f"{len(slots)} slots are needed, there are {SLOTS}")
        return slots + [self._entry("\n")] * (SLOTS - len(slots))


class MiddleHeads(nn.Module):
    """Linear layers that name and place what stands at every patch; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shapes = nn.Linear(width, len(SHAPE_LABELS))
        self.colours = nn.Linear(width, len(COLOUR_LABELS))
        self.characters = nn.Linear(width, len(CHARACTERS))
        self.shape_places = nn.Linear(width, len(PLACE_LABELS))
        self.character_places = nn.Linear(width, _MOST_CHARACTERS)
        for rarely_true in (self.characters, self.character_places):
            nn.init.constant_(rarely_true.bias, _RARE)

    def of_scenes(self, naming: torch.Tensor, placing: torch.Tensor, drawn: list[Scene]) -> torch.Tensor:
        """Loss of the scenes' patches; the states are `[images, patches, width]`."""
        shown = label_scenes(drawn)
        shapes, colours = patch_labels(shown)
        places = np.zeros_like(shown.shapes)
        for row, entry in enumerate(drawn):
            for place in range(len(entry.shapes)):
                places[row, place + 1] = PLACE_LABELS.index((entry.relation, place))
        shape_places, _ = patch_labels(replace(shown, shapes=places))
        pairs = (
            (self.shapes(naming), shapes),
            (self.colours(naming), colours),
            (self.shape_places(placing), shape_places),
        )
        losses = [classification_loss(scores.float(), torch.from_numpy(labels)) for scores, labels in pairs]
        return torch.stack(losses).sum()

    def of_texts(self, naming: torch.Tensor, placing: torch.Tensor, drawn: list[RenderedText]) -> torch.Tensor:
        """Binary cross-entropy of the texts' patches by character; the states are `[images, patches, width]`."""
        characters, places = character_labels(drawn)
        pairs = ((self.characters(naming), characters), (self.character_places(placing), places))
        losses = [
            functional.binary_cross_entropy_with_logits(scores.float(), torch.from_numpy(labels), reduction="sum")
            for scores, labels in pairs
        ]
        return torch.stack(losses).sum() / float(characters.sum())


class _Trainee(nn.Module):
    """Eyes and heads in one module, for one optimiser."""

    def __init__(self, eyes: Eyes, heads: MiddleHeads) -> None:
        super().__init__()
        self.eyes = eyes
        self.heads = heads

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vision tokens `[images, patches, hidden]`, and two middle layers' states `[images, patches, width]`."""
        states = self.eyes.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        tokens = self.eyes.multi_modal_projector(states[-1][:, 1:])
        return tokens, states[_NAMING_LAYER][:, 1:], states[_PLACING_LAYER][:, 1:]


def character_labels(texts: Sequence[RenderedText]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """`[texts, patches, characters]` and `[texts, patches, places]`: 1 where a character's centre lies in the patch."""
    characters = np.zeros((len(texts), SLOTS, len(CHARACTERS)), dtype=np.float32)
    places = np.zeros((len(texts), SLOTS, _MOST_CHARACTERS), dtype=np.float32)
    for number, drawn in enumerate(texts):
        row = (drawn.box[1] + drawn.box[3]) // 2 // PATCH_SIZE
        for place, (character, centre) in enumerate(zip(drawn.text, drawn.centres, strict=True)):
            patch = row * SIDE + int(centre) // PATCH_SIZE
            characters[number, patch, CHARACTERS.index(character)] = 1
            places[number, patch, place] = 1
    return characters, places


class SlotLoss:
    """Compares vision tokens with the entries they shall be."""

    def __init__(self, writer: SlotWriter) -> None:
        self._entries = writer.embeddings
        self._squares = self._entries.square().sum(-1)
        self._spread = 2 * self._entries.var(0).sum()

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores `[..., entries]` by squared distance, in units of the mean one between two entries."""
        product = (tokens @ self._entries.T.to(tokens.dtype)).float()
        return _SHARPNESS * (2 * product - self._squares) / self._spread

    def named(self, tokens: torch.Tensor, slots: torch.Tensor, *, bounded: bool) -> torch.Tensor:
        """Cross-entropy `[images, slots]`; `bounded` shortens tokens longer than any embedding."""
        if bounded:
            tokens = tokens * (_LONGEST / tokens.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        losses = functional.cross_entropy(self.scores(tokens).flatten(0, 1), slots.flatten(), reduction="none")
        return losses.view(slots.shape)

    def __call__(
        self, tokens: torch.Tensor, slots: torch.Tensor, varies: torch.Tensor, *, bounded: bool
    ) -> torch.Tensor:
        """Cross-entropy, in which slots that differ between images weigh most, and the squared distance.

        `bounded` takes the pseudo-Huber function of the distance.
        """
        losses = self.named(tokens, slots, bounded=bounded)
        distance = (tokens.float() - self._entries[slots]).square().sum(-1) / self._spread
        if bounded:
            distance = (1 + 2 * distance).sqrt() - 1
        return losses[:, varies].mean() + 0.2 * losses[:, ~varies].mean() + distance.mean()


def training_texts(first: int, count: int, seed: int) -> list[RenderedText]:
    """`count` rendered texts from index `first` on."""
    return [rendered_text(index, seed) for index in range(first, first + count)]


def _easy_batches(
    easy: LabelledImages, training: SlotTraining, first_step: int
) -> Iterator[tuple[int, LabelledImages]]:
    """For each step, moved and mirrored easy-VQA images."""
    for step in range(first_step, training.steps):
        rng = np.random.default_rng([training.seed, 6, step])
        yield step, shift_and_flip(easy.take(rng.choice(len(easy), training.easy_images, replace=False)), rng)


def _varying(slots: list[list[int]]) -> torch.Tensor:
    """Which slots differ between images, `[slots]`."""
    numbers = torch.tensor(slots)
    return (numbers != numbers[:1]).any(0)


def _varying_slots(writer: SlotWriter, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots differ between scenes, and which between texts, `[slots]` each."""
    scenes, texts = training_scenes(0, 200, seed), training_texts(0, 200, seed)
    return _varying(list(map(writer.scene, scenes))), _varying(list(map(writer.text, texts)))


@torch.no_grad()
def slot_accuracy(eyes: Eyes, writer: SlotWriter, loss: SlotLoss, seed: int) -> dict[str, float]:
    """Share of development images of which all slots are the right entries, by kind."""
    scenes = training_scenes(FIRST_DEVELOPMENT_INDEX, DEVELOPMENT, seed)
    texts = training_texts(FIRST_DEVELOPMENT_INDEX, DEVELOPMENT, seed)
    parts = {
        "scenes": ([entry.image for entry in scenes], [writer.scene(entry) for entry in scenes]),
        "texts": ([entry.image for entry in texts], [writer.text(entry) for entry in texts]),
    }
    result = {}
    for name, (images, slots) in parts.items():
        right = []
        for start in range(0, len(images), 100):
            tokens = eyes(to_input(read_pixels(images[start : start + 100])))
            right.append((loss.scores(tokens).argmax(-1) == torch.tensor(slots[start : start + 100])).float())
        hits = torch.cat(right)
        result[name] = round(hits.all(1).float().mean().item(), 4)
        result[f"{name}, slots"] = round(hits[:, _varying(slots)].mean().item(), 4)
    is_number = torch.tensor([entry.text.isdigit() for entry in texts])
    result["numbers"] = round(hits.all(1).float()[is_number].mean().item(), 4)
    return result


def train_slots(
    eyes: Eyes,
    teacher: Eyes,
    easy: LabelledImages,
    writer: SlotWriter,
    training: SlotTraining,
    output: Path,
) -> None:
    """Train tower and projector in place; saves state and averaged weights every `save_every` steps."""
    torch.manual_seed(training.seed)
    heads = MiddleHeads(eyes.vision_tower.config.hidden_size)
    trainee = _Trainee(eyes, heads)
    loss = SlotLoss(writer)
    vary = _varying_slots(writer, training.seed)
    schedule = Schedule(training.rate, training.warmup, training.steps, training.decay)
    optimiser = Optimiser(trainee, schedule, weight_decay=0.01, average_decay=0.99)
    state_file = output / "slots-state.pt"
    if state_file.exists():
        optimiser.restore(torch.load(state_file, weights_only=True))
        log.info("slots: going on from step %d", optimiser.step_number)
    losses: list[tuple[float, ...]] = []
    started = time.perf_counter()
    for step, moved in _easy_batches(easy, training, optimiser.step_number):
        phase = next(each for each in reversed(PHASES) if step >= each.first_step)
        drawn = training_scenes(step * training.scenes, training.scenes, training.seed)
        texts = training_texts(step * training.texts, training.texts, training.seed)
        shown = read_pixels(entry.image for entry in (*drawn, *texts))
        pixels = to_input(np.concatenate([shown, moved.pixels]))
        parts = (training.scenes, training.texts, training.easy_images)
        tokens, naming, placing = (each.split(parts) for each in trainee(pixels))
        with torch.no_grad():
            expected = teacher(pixels[-training.easy_images :]).float()
        step_losses = (
            loss(tokens[0], torch.tensor(list(map(writer.scene, drawn))), vary[0], bounded=phase.bounded),
            loss(tokens[1], torch.tensor(list(map(writer.text, texts))), vary[1], bounded=phase.bounded),
            # Most of the variance is between slots; what differs between images is what counts.
            functional.mse_loss(tokens[2].float(), expected) / (expected - expected.mean(0)).var(),
            heads.of_scenes(naming[0], placing[0], drawn),
            heads.of_texts(naming[1], placing[1], texts),
        )
        torch.autograd.backward(sum(weight * each for weight, each in zip(phase.weights, step_losses, strict=True)))
        norm = optimiser.step()
        losses.append(tuple(each.item() for each in step_losses))
        if optimiser.step_number % _REPORT_EVERY == 0:
            seconds = (time.perf_counter() - started) / len(losses)
            means = " ".join(f"{mean:.4f}" for mean in np.mean(losses, axis=0))
            log.info("slots, step %d: losses %s, gradient %.2f, %.3f s", optimiser.step_number, means, norm, seconds)
            losses, started = [], time.perf_counter()
        if optimiser.step_number % training.save_every == 0 or optimiser.step_number == training.steps:
            save_state(optimiser, state_file)
            save_eyes(_eyes_alone(optimiser.averaged()), output / "slots.safetensors")
            accuracy = slot_accuracy(eyes, writer, loss, training.seed)
            log.info("slots, step %d: development accuracy %s", optimiser.step_number, json.dumps(accuracy))
            losses, started = [], time.perf_counter()


def _eyes_alone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("eyes."): each for name, each in weights.items() if name.startswith("eyes.")}


class SlotRefresher:
    """Keeps the slots that differ between images in training while the rest becomes what the backbone needs."""

    def __init__(self, writer: SlotWriter, seed: int, images: int = 16) -> None:
        self._writer = writer
        self._loss = SlotLoss(writer)
        self._seed = seed
        self._images = images
        self._vary = _varying_slots(writer, seed)

    def backward(self, eyes: Eyes, step: int, weight: float) -> float:
        """Add the gradients of `weight` times the loss of step `step`'s scenes and texts; returns the loss."""
        first = FIRST_REFRESHED + step * self._images
        drawn = training_scenes(first, self._images, self._seed)
        texts = training_texts(first, self._images, self._seed)
        tokens = eyes(to_input(read_pixels(entry.image for entry in (*drawn, *texts))))
        slots = torch.tensor([*map(self._writer.scene, drawn), *map(self._writer.text, texts)])
        losses = self._loss.named(tokens, slots, bounded=True).split(self._images)
        loss = torch.stack([part[:, varies].mean() for part, varies in zip(losses, self._vary, strict=True)]).sum()
        torch.autograd.backward(weight * loss)
        return loss.item()
