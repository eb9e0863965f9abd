"""Samples: a question about an image, and how the image is opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import ImageError, TaskError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: str

    def open(self) -> Image:
        """Decode the image as RGB. Raises ImageError naming the file."""
        from PIL import Image

        try:
            with Image.open(Path(self.path)) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f"image {self.path} cannot be decoded: {_one_line(error)}") from None


@dataclass(frozen=True)
class SceneImage:
    """The image of a generated scene."""

    index: int
    seed: int

    def open(self) -> Image:
        """Draw the scene."""
        from .scenes import scene

        return scene(self.index, self.seed).image.convert("RGB")


@dataclass(frozen=True)
class HubImage:
    """An image in one row of a dataset of the Hugging Face hub (or of a directory that ``datasets`` can load)."""

    dataset: str
    subset: str | None
    split: str
    revision: str | None
    column: str
    row: int

    def open(self) -> Image:
        """Decode the image as RGB. Raises ImageError naming dataset and row."""
        import io

        from PIL import Image

        stored = _hub_images(self.dataset, self.subset, self.split, self.revision, self.column)[self.row][self.column]
        try:
            source: Any = io.BytesIO(stored["bytes"]) if stored.get("bytes") is not None else stored["path"]
            with Image.open(source) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f"dataset {self.dataset}, row {self.row}: cannot decode: {_one_line(error)}") from None


@lru_cache(maxsize=4)
def _hub_images(dataset: str, subset: str | None, split: str, revision: str | None, column: str) -> Any:
    from .hub import load_undecoded

    return load_undecoded(dataset, subset, split, revision, column)


ImageReference = ImageFile | SceneImage | HubImage


@dataclass(frozen=True)
class Sample:
    """One question about one image, with the answers that count as right."""

    id: str
    image: ImageReference
    image_key: str
    """Equal for equal images (a hash of the content), so that no image is in two splits."""
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    """The options, of which ``answers`` holds the right one; empty where the task is not to choose."""

    @property
    def content(self) -> list[Any]:
        """What a score on it depends on, as JSON holds it."""
        options = [list(self.choices)] if self.choices else []
        return [self.image_key, self.question, list(self.answers), *options]

    def __post_init__(self) -> None:
        if not any(answer.strip() for answer in self.answers):
            raise TaskError(f"sample {self.id} has no answer")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
