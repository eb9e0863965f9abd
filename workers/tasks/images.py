"""Images of samples: where each one is, and how it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import ImageError, TaskError
from workers.text import one_line

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
            raise ImageError(f"image {self.path} cannot be decoded: {one_line(error)}") from None


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
            raise ImageError(f"dataset {self.dataset}, row {self.row}: cannot decode: {one_line(error)}") from None


@lru_cache(maxsize=4)
def _hub_images(dataset: str, subset: str | None, split: str, revision: str | None, column: str) -> Any:
    return load_undecoded(dataset, subset, split, revision, column)


ImageReference = ImageFile | SceneImage | HubImage


def load_undecoded(dataset: str, subset: str | None, split: str, revision: str | None, column: str) -> Any:
    """Load a dataset with its image column left undecoded (``{"bytes": ..., "path": ...}``). Raises TaskError."""
    try:
        import datasets
    except ImportError:
        raise TaskError("source.kind hub needs the datasets package: pip install 'skipplan[hub]'") from None
    try:
        loaded = datasets.load_dataset(dataset, subset, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds: of its own, of the hub client, of the network
        raise TaskError(f"dataset {dataset} cannot be loaded (split {split}): {one_line(error)}") from None
    if column not in loaded.column_names:
        raise TaskError(f"dataset {dataset}: no column {column!r}; it has {', '.join(loaded.column_names)}")
    if not isinstance(loaded.features[column], datasets.Image):
        raise TaskError(f"dataset {dataset}: column {column!r} holds no images")
    return loaded.cast_column(column, datasets.Image(decode=False))
