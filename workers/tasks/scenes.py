"""Draw scenes: images of two or three coloured shapes with one canonical caption each.

`scene(index, seed)` is a pure function of its two arguments, so a range of indices is a data set that needs no files.
Colours and shapes follow the easy-VQA vocabulary. The layout is unambiguous by construction: the shapes of a scene lie
in one row or one column, apart from each other along that axis and never far from it, and the caption reads them in
order, e.g. "a red circle left of a blue square" or "a gray triangle above a teal square above a red circle".

Indices below `FIRST_EVALUATION_INDEX` are for training the reference model, the ones from there on for evaluation.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Width and height of a scene in pixels."""

FIRST_EVALUATION_INDEX = 1_000_000
"""Training uses smaller indices, evaluation tasks use this one and larger, of the same seed."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "above")

_SHARE_OF_THREE = 0.3
_SUPERSAMPLING = 4
_COLOUR_JITTER = 12
_BACKGROUND_RANGE = (228, 255)
_RADII = {2: (5.5, 12.0), 3: (5.0, 8.5)}
_MARGIN = 1.5
_SMALLEST_GAP = 2.0
_LARGEST_SLOPE = 0.5
_CORNERS = {"square": 4, "triangle": 3}
_LARGEST_TURN = {"square": 20.0, "triangle": 30.0}


@dataclass(frozen=True)
class Shape:
    """One drawn shape: names, centre and circumscribed radius in pixels, rotation in degrees, the colour drawn."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float
    fill: tuple[int, int, int]

    @property
    def phrase(self) -> str:
        """The shape as the caption says it, e.g. "a red circle"."""
        return f"a {self.colour} {self.shape}"

    def draw(self, canvas: ImageDraw.ImageDraw, fill: tuple[int, int, int] | int, scale: float = 1.0) -> None:
        """Draw the shape in `fill` on a canvas whose pixels are `1 / scale` scene pixels wide."""
        x, y, radius = self.x * scale, self.y * scale, self.radius * scale
        if self.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            return
        corners = _CORNERS[self.shape]
        start = -90.0 + (180.0 / corners if self.shape == "square" else 0.0) + self.turn
        angles = [math.radians(start + 360.0 * corner / corners) for corner in range(corners)]
        canvas.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], fill=fill)


@dataclass(frozen=True)
class Scene:
    """An image of `IMAGE_SIZE` squared RGB pixels, its caption, and the shapes in the caption's order."""

    image: Image.Image
    caption: str
    shapes: tuple[Shape, ...]
    relation: str


@dataclass(frozen=True)
class SceneQuestion:
    """A question that can be asked of every scene, and the function that answers it."""

    prompt: str
    answer: Callable[[Scene], str]


_NUMBERS = {2: "two", 3: "three"}
_ORDINALS = ("first", "second", "third")
_LINES = {"left of": ("row", "left", "right"), "above": ("column", "top", "bottom")}


def _describe(drawn: Scene) -> str:
    line, begin, end = _LINES[drawn.relation]
    sentences = [f"There are {_NUMBERS[len(drawn.shapes)]} shapes in a {line}, from {begin} to {end}."]
    sentences += [f"The {_ORDINALS[place]} is {shape.phrase}." for place, shape in enumerate(drawn.shapes)]
    for first, second in itertools.pairwise(drawn.shapes):
        sentences.append(f"The {first.colour} {first.shape} is {drawn.relation} the {second.colour} {second.shape}.")
    return " ".join(sentences)


QUESTIONS: dict[str, SceneQuestion] = {
    "caption": SceneQuestion("describe the image", lambda drawn: drawn.caption),
    "description": SceneQuestion("describe the image in detail", _describe),
    "count": SceneQuestion("how many shapes are there?", lambda drawn: _NUMBERS[len(drawn.shapes)]),
}
"""By name. A description has four or six sentences, 37 to 58 of SmolLM2's tokens."""


def scene(index: int, seed: int) -> Scene:
    """Draw scene number `index` of the endless data set `seed`.

    Raises:
        ValueError: if `index` is negative.
    """
    if index < 0:
        raise ValueError(f"scene index {index} is negative; it must be 0 or more")
    rng = random.Random(f"scenes:{seed}:{index}")
    count = 3 if rng.random() < _SHARE_OF_THREE else 2
    relation = rng.choice(RELATIONS)
    shapes = _place(rng, count, relation)
    background = tuple(rng.randint(*_BACKGROUND_RANGE) for _ in range(3))
    size = IMAGE_SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (size, size), background)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        shape.draw(canvas, shape.fill, _SUPERSAMPLING)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    caption = f" {relation} ".join(shape.phrase for shape in shapes)
    return Scene(image=image, caption=caption, shapes=shapes, relation=relation)


def _place(rng: random.Random, count: int, relation: str) -> tuple[Shape, ...]:
    """Choose `count` shapes and lay them out along the relation's axis without overlap."""
    radii = [rng.uniform(*_RADII[count]) for _ in range(count)]
    slack = IMAGE_SIZE - 2 * _MARGIN - 2 * sum(radii) - _SMALLEST_GAP * (count - 1)
    # Cutting the free room at sorted uniform points spreads it evenly over the two ends and the gaps.
    cuts = sorted(rng.uniform(0.0, slack) for _ in range(count))
    along: list[float] = []
    used = _MARGIN
    for number, radius in enumerate(radii):
        along.append(used + cuts[number] + radius)
        used += 2 * radius + _SMALLEST_GAP
    across = _offsets_across(rng, along, radii)
    shapes = []
    for main, cross, radius in zip(along, across, radii, strict=True):
        colour, shape = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        x, y = (main, cross) if relation == "left of" else (cross, main)
        turn = rng.uniform(-1.0, 1.0) * _LARGEST_TURN.get(shape, 0.0)
        fill = tuple(min(255, max(0, part + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for part in COLOURS[colour])
        shapes.append(Shape(colour, shape, x, y, radius, turn, (fill[0], fill[1], fill[2])))
    return tuple(shapes)


def _offsets_across(rng: random.Random, along: list[float], radii: list[float]) -> list[float]:
    """Choose positions across the axis: shapes stay clearly more apart along the axis than across it."""
    across: list[float] = []
    for number, radius in enumerate(radii):
        lowest, highest = _MARGIN + radius, IMAGE_SIZE - _MARGIN - radius
        for earlier in range(number):
            reach = _LARGEST_SLOPE * (along[number] - along[earlier])
            lowest, highest = max(lowest, across[earlier] - reach), min(highest, across[earlier] + reach)
        across.append(rng.uniform(lowest, highest))
    return across
