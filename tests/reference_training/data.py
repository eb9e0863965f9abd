"""What the reference model is trained and measured on: easy-VQA images with their questions, and drawn scenes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import easy_vqa
import numpy as np
import numpy.typing as npt
from PIL import Image

from workers.tasks.scenes import COLOURS, FIRST_EVALUATION_INDEX, Scene, scene

TRAINING_IMAGES = 3800
"""easy-VQA training images that are trained on; the remaining 200 serve for choices made during development."""

EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")
"""Shape names in easy-VQA; what a scene calls a square is a rectangle there."""

CAPTION_PROMPT = "describe the image"
"""The question that asks for a scene's caption."""

CAPTION_PROMPTS = (CAPTION_PROMPT, "Describe the image.", "describe this image", "what does the image show?")
"""Wordings a caption is asked for with in training; the first one most of the time."""

PIXEL_CENTRE = 127.5
"""Pixel value that the image processor maps to 0; 0 and 255 become -1 and 1."""


@dataclass(frozen=True)
class EasyVqaImage:
    """One easy-VQA image with all its questions and answers."""

    image_id: int
    path: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def shape_and_colour(self) -> tuple[str, str]:
        """The shape and the colour shown, as far as questions and answers tell them ("" where none does)."""
        shapes, colours = set(), set()
        for question, answer in zip(self.questions, self.answers, strict=True):
            words = set(question.rstrip("?").split())
            open_question = "what" in words
            # "is there not a red shape?" - "no" tells as much as "is there a red shape?" - "yes".
            confirmed = open_question or (answer == "yes") != _is_negated(words)
            told = (words if confirmed else set()) | {answer}
            shapes |= told & set(EASY_VQA_SHAPES)
            colours |= told & set(COLOURS)
        return next(iter(shapes), ""), next(iter(colours), "")


class YesNoQuestions:
    """Yes/no questions in the wordings of a set of images, asked so that both answers are about equally likely.

    In easy-VQA four of five yes/no questions ask for something that is not there, and a model learns that share long
    before it learns to look. Asked in balance, and more often without a negation than with one, looking pays at once.
    """

    def __init__(self, images: Iterable[EasyVqaImage]) -> None:
        asked = {question for image in images for question in image.questions if not question.startswith("what")}
        self._wordings: dict[tuple[str, bool], list[str]] = {}
        for question in sorted(asked):
            words = question.rstrip("?").split()
            named = [word for word in words if word in COLOURS or word in EASY_VQA_SHAPES]
            self._wordings.setdefault((named[0], _is_negated(words)), []).append(question)

    def balanced(self, image: EasyVqaImage, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Up to seven questions and answers, three of them affirmed.

        Without a negation: one for the shape and one for the colour shown, one for another shape, two for other
        colours; with a negation: one for what is shown and one for what is not. Fewer where the image's own questions
        do not tell the shape or the colour.
        """
        shape, colour = image.shape_and_colour
        shown = [name for name in (shape, colour) if name]
        other_shapes = [name for name in EASY_VQA_SHAPES if shape and name != shape]
        other_colours = [name for name in COLOURS if colour and name != colour]
        absent = [*rng.permutation(other_shapes)[:1], *rng.permutation(other_colours)[:2]]
        chosen = [(str(name), False) for name in (*shown, *absent)]
        chosen += [(str(rng.choice(names)), True) for names in (shown, absent) if len(names)]
        pairs = []
        for name, negated in chosen:
            wordings = self._wordings.get((name, negated), [])
            if wordings:
                answer = "yes" if (name in shown) != negated else "no"
                pairs.append((wordings[rng.integers(len(wordings))], answer))
        return pairs


def _is_negated(words: Iterable[str]) -> bool:
    """Whether a question asks if something is not there."""
    return bool({"not", "no"} & set(words))


def easy_vqa_images(split: str) -> list[EasyVqaImage]:
    """All images of `split` ("train" or "test") of the installed easy-vqa package, by image id.

    Raises:
        ValueError: for another split name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"easy-vqa has no split {split!r}; use 'train' or 'test'")
    rows = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    pairs: dict[int, list[tuple[str, str]]] = {image_id: [] for image_id in paths}
    for question, answer, image_id in zip(*rows, strict=True):
        pairs[image_id].append((question, answer))
    return [
        EasyVqaImage(
            image_id, str(paths[image_id]), tuple(q for q, _ in pairs[image_id]), tuple(a for _, a in pairs[image_id])
        )
        for image_id in sorted(paths)
    ]


def easy_vqa_training_images() -> list[EasyVqaImage]:
    """The easy-VQA images the reference model is trained on."""
    return easy_vqa_images("train")[:TRAINING_IMAGES]


def easy_vqa_development_images() -> list[EasyVqaImage]:
    """Training-split images that are never trained on, for choices made during development."""
    return easy_vqa_images("train")[TRAINING_IMAGES:]


def training_scenes(first: int, count: int, seed: int) -> list[Scene]:
    """`count` scenes from index `first` on, all below the evaluation range.

    Raises:
        ValueError: if the range reaches into the evaluation indices.
    """
    if first + count > FIRST_EVALUATION_INDEX:
        raise ValueError(
            f"training scenes {first}..{first + count - 1} reach into the evaluation range; "
            f"indices must stay below {FIRST_EVALUATION_INDEX}"
        )
    return [scene(index, seed) for index in range(first, first + count)]


def read_pixels(images: Iterable[Image.Image]) -> npt.NDArray[np.uint8]:
    """Stack 64x64 images as `[images, 3, height, width]` bytes."""
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1) for image in images])


def open_images(images: Sequence[EasyVqaImage]) -> npt.NDArray[np.uint8]:
    """Pixels of easy-VQA images, `[images, 3, height, width]` bytes."""
    pixels = []
    for entry in images:
        with Image.open(entry.path) as image:
            pixels.append(read_pixels([image])[0])
    return np.stack(pixels)
