"""Stage 1: teach the vision tower what each patch shows, the shape and the colour, on easy-VQA images and scenes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel

from reference_training.data import (
    EASY_VQA_SHAPES,
    PIXEL_CENTRE,
    EasyVqaImage,
    open_images,
    read_pixels,
    training_scenes,
)
from reference_training.model import Architecture
from workers.reference.smollm2 import PATCH_SIZE, vision_config
from workers.tasks.scenes import COLOURS, IMAGE_SIZE, Scene, Shape

from .optimisation import Optimiser, Schedule
from .recipe import VisionTraining

log = logging.getLogger(__name__)

SHAPE_LABELS = ("nothing", *EASY_VQA_SHAPES)
COLOUR_LABELS = ("nothing", *COLOURS)
IGNORED = -100
_MOST_SHAPES = 3
_SMALLEST_COVER = 0.1
_LARGEST_SHIFT = 12

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledImages:
    """Images with, for every pixel, the number of the shape that covers it.

    pixels: `[images, 3, height, width]` bytes. owners: `[images, height, width]` bytes, 0 where nothing is.
    shapes, colours: `[images, 1 + shapes]` labels by owner number, `IGNORED` where unknown.
    backgrounds: `[images, 3]` bytes.
    """

    pixels: Bytes
    owners: Bytes
    shapes: Integers
    colours: Integers
    backgrounds: Bytes

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, chosen: Integers) -> LabelledImages:
        """The images at the positions `chosen`."""
        return LabelledImages(
            self.pixels[chosen],
            self.owners[chosen],
            self.shapes[chosen],
            self.colours[chosen],
            self.backgrounds[chosen],
        )

    def joined(self, other: LabelledImages) -> LabelledImages:
        """These images followed by the other ones."""
        return LabelledImages(
            np.concatenate([self.pixels, other.pixels]),
            np.concatenate([self.owners, other.owners]),
            np.concatenate([self.shapes, other.shapes]),
            np.concatenate([self.colours, other.colours]),
            np.concatenate([self.backgrounds, other.backgrounds]),
        )


def label_easy_vqa(images: list[EasyVqaImage]) -> LabelledImages:
    """Label easy-VQA images: one shape on a plain background, named by the questions."""
    pixels = open_images(images)
    # The border's median colour is the background even where the shape touches an edge.
    border = np.concatenate([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], axis=2)
    backgrounds = np.median(border, axis=2).astype(np.uint8)
    owners = (pixels != backgrounds[:, :, None, None]).any(axis=1).astype(np.uint8)
    shapes = np.zeros((len(images), 1 + _MOST_SHAPES), dtype=np.int64)
    colours = np.zeros_like(shapes)
    for row, image in enumerate(images):
        shape, colour = image.shape_and_colour
        shapes[row, 1] = SHAPE_LABELS.index(shape) if shape else IGNORED
        colours[row, 1] = COLOUR_LABELS.index(colour) if colour else IGNORED
    return LabelledImages(pixels, owners, shapes, colours, backgrounds)


def label_scenes(scenes: list[Scene]) -> LabelledImages:
    """Label drawn scenes; a square counts as easy-VQA's rectangle."""
    owners = np.stack([_owner_map(entry.shapes) for entry in scenes])
    shapes = np.zeros((len(scenes), 1 + _MOST_SHAPES), dtype=np.int64)
    colours = np.zeros_like(shapes)
    for row, entry in enumerate(scenes):
        for number, shape in enumerate(entry.shapes, start=1):
            shapes[row, number] = SHAPE_LABELS.index("rectangle" if shape.shape == "square" else shape.shape)
            colours[row, number] = COLOUR_LABELS.index(shape.colour)
    pixels = read_pixels(entry.image for entry in scenes)
    backgrounds = pixels[:, :, 0, 0].copy()
    return LabelledImages(pixels, owners, shapes, colours, backgrounds)


def _owner_map(shapes: tuple[Shape, ...]) -> Bytes:
    """`[height, width]`: the number of the shape at each pixel, 0 for none."""
    image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    canvas = ImageDraw.Draw(image)
    for number, shape in enumerate(shapes, start=1):
        shape.draw(canvas, number)
    return np.asarray(image, dtype=np.uint8)


def shift_and_flip(images: LabelledImages, rng: np.random.Generator) -> LabelledImages:
    """Move every image by a few pixels, filling with its background, and mirror it at random."""
    pixels = np.empty_like(images.pixels)
    pixels[:] = images.backgrounds[:, :, None, None]
    owners = np.zeros_like(images.owners)
    shifts = rng.integers(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1, size=(len(images), 2))
    flips = rng.integers(0, 2, size=(len(images), 2)) * -2 + 1
    for row, ((down, right), (vertical, horizontal)) in enumerate(zip(shifts, flips, strict=True)):
        to_rows, from_rows = _shifted(down)
        to_columns, from_columns = _shifted(right)
        pixels[row, :, to_rows, to_columns] = images.pixels[row, :, from_rows, from_columns]
        owners[row, to_rows, to_columns] = images.owners[row, from_rows, from_columns]
        pixels[row] = pixels[row, :, ::vertical, ::horizontal]
        owners[row] = owners[row, ::vertical, ::horizontal]
    return LabelledImages(pixels, owners, images.shapes, images.colours, images.backgrounds)


def _shifted(offset: int) -> tuple[slice, slice]:
    """Where pixels go to and come from when an axis is moved by `offset`."""
    size = IMAGE_SIZE
    if offset >= 0:
        return slice(offset, size), slice(0, size - offset)
    return slice(0, size + offset), slice(-offset, size)


def patch_labels(images: LabelledImages) -> tuple[Integers, Integers]:
    """Shape and colour labels `[images, patches]` of every patch.

    A patch shows the shape that covers most of it, "nothing" where no shape reaches, and is ignored where a shape only
    grazes it, unless no patch holds more of that shape.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    patches = images.owners.reshape(len(images), side, PATCH_SIZE, side, PATCH_SIZE).transpose(0, 1, 3, 2, 4)
    patches = patches.reshape(len(images), side * side, PATCH_SIZE * PATCH_SIZE)
    cover = np.stack([(patches == number).mean(axis=2) for number in range(1, 1 + _MOST_SHAPES)], axis=2)
    owner = cover.argmax(axis=2) + 1
    share = cover.max(axis=2)
    fullest = (cover == cover.max(axis=1, keepdims=True)) & (cover > 0)
    is_fullest = np.take_along_axis(fullest, owner[:, :, None] - 1, axis=2)[:, :, 0]
    grazed = (share > 0) & (share < _SMALLEST_COVER) & ~is_fullest
    owner = np.where(share > 0, owner, 0)
    shapes = np.take_along_axis(images.shapes, owner, axis=1)
    colours = np.take_along_axis(images.colours, owner, axis=1)
    return np.where(grazed, IGNORED, shapes), np.where(grazed, IGNORED, colours)


class PatchClassifier(nn.Module):
    """A CLIP vision tower with one linear layer that names the shape and the colour at every patch."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = vision_config(architecture)
        config._attn_implementation = "eager"
        self.tower = CLIPVisionModel(config)
        self.head = nn.Linear(architecture.vision_width, len(SHAPE_LABELS) + len(COLOUR_LABELS))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[images, 3, height, width]` to shape and colour scores `[images, patches, labels]`."""
        # The features LLaVA takes: the last encoder layer's output without the class token.
        states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        scores = self.head(states).float()
        return scores[..., : len(SHAPE_LABELS)], scores[..., len(SHAPE_LABELS) :]


def to_input(pixels: Bytes) -> torch.Tensor:
    """Bytes to what the image processor gives, in bfloat16."""
    return (torch.from_numpy(pixels).float() / PIXEL_CENTRE - 1.0).to(torch.bfloat16)


def classification_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which the few patches that show something weigh as much as the empty ones."""
    losses = functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    shown, empty = labels.flatten() > 0, labels.flatten() == 0
    return losses[shown].sum() / shown.sum().clamp(min=1) + losses[empty].sum() / empty.sum().clamp(min=1)


def _epoch(easy: LabelledImages, training: VisionTraining, epoch: int) -> Iterator[LabelledImages]:
    """Batches of one epoch: all easy-VQA images and fresh scenes, moved and mirrored, in random order."""
    rng = np.random.default_rng([training.seed, 1, epoch])
    drawn = training_scenes(epoch * training.scenes_per_epoch, training.scenes_per_epoch, training.seed)
    images = easy.joined(label_scenes(drawn))
    order = rng.permutation(len(images))
    for start in range(0, len(order) - training.batch + 1, training.batch):
        yield shift_and_flip(images.take(order[start : start + training.batch]), rng)


@torch.no_grad()
def patch_accuracy(model: PatchClassifier, images: LabelledImages) -> float:
    """Share of the patches showing something of which both the shape and the colour are named right."""
    right = total = 0
    for start in range(0, len(images), 100):
        part = images.take(np.arange(start, min(start + 100, len(images))))
        shape_scores, colour_scores = model(to_input(part.pixels))
        shapes, colours = patch_labels(part)
        counted = (shapes > 0) & (colours > 0)
        hit = (shape_scores.argmax(-1).numpy() == shapes) & (colour_scores.argmax(-1).numpy() == colours)
        right += int((hit & counted).sum())
        total += int(counted.sum())
    return right / max(1, total)


def train_vision(
    training: VisionTraining,
    architecture: Architecture,
    easy_images: list[EasyVqaImage],
    development: dict[str, LabelledImages],
) -> dict[str, Any]:
    """Train the tower; returns its averaged weights by name. The result depends on the arguments alone."""
    model = PatchClassifier(architecture, training.seed)
    easy = label_easy_vqa(easy_images)
    batches = (len(easy) + training.scenes_per_epoch) // training.batch
    total = batches * training.epochs
    optimiser = Optimiser(model, Schedule(training.rate, warmup=150, total=total, decay=0.4))
    for epoch in range(training.epochs):
        started, losses = time.perf_counter(), []
        for batch in _epoch(easy, training, epoch):
            shapes, colours = (torch.from_numpy(labels) for labels in patch_labels(batch))
            shape_scores, colour_scores = model(to_input(batch.pixels))
            loss = classification_loss(shape_scores, shapes) + classification_loss(colour_scores, colours)
            torch.autograd.backward(loss)
            optimiser.step()
            losses.append(loss.item())
        accuracy = {name: round(patch_accuracy(model, images), 4) for name, images in development.items()}
        log.info(
            "vision epoch %d/%d: loss %.4f, patches right %s, %.1f s",
            epoch + 1,
            training.epochs,
            float(np.mean(losses)),
            accuracy,
            time.perf_counter() - started,
        )
    averaged = optimiser.averaged()
    return {name.removeprefix("tower."): value for name, value in averaged.items() if name.startswith("tower.")}
