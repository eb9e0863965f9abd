"""Find, hash and open the images of samples."""

from __future__ import annotations

import hashlib
import io
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
    """Image in a file of its own."""

    path: str

    def open(self) -> Image:
        """Decode the image as RGB. Raises ImageError naming the file."""
        return _decode(Path(self.path), f"image {self.path} cannot be decoded")


@dataclass(frozen=True)
class SceneImage:
    """Image that is drawn from a scene's number."""

    index: int
    seed: int

    def open(self) -> Image:
        """Draw the scene."""
        from .scenes import scene

        return scene(self.index, self.seed).image.convert("RGB")


@dataclass(frozen=True)
class HubImage:
    """Image in one row of a dataset of the Hugging Face hub (or of a directory that ``datasets`` can load)."""

    dataset: str
    subset: str | None
    split: str
    revision: str | None
    column: str
    row: int

    def open(self) -> Image:
        """Decode the image as RGB. Raises ImageError naming dataset and row."""
        stored = _hub_images(self.dataset, self.subset, self.split, self.revision, self.column)[self.row][self.column]
        source = stored["path"] if stored.get("bytes") is None else io.BytesIO(stored["bytes"])
        return _decode(source, f"dataset {self.dataset}, row {self.row}: cannot decode")


@lru_cache(maxsize=4)
def _hub_images(dataset: str, subset: str | None, split: str, revision: str | None, column: str) -> Any:
    return load_undecoded(dataset, subset, split, revision, column)


ImageReference = ImageFile | SceneImage | HubImage


def _decode(source: Any, problem: str) -> Image:
    from PIL import Image

    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{problem}: {one_line(error)}") from None


def hash_image(path: Path, where: str) -> str:
    """Return the SHA-256 of an image file's content. Raises TaskError if it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise TaskError(f"{where}: image {path} does not exist") from None
    except OSError as error:
        raise TaskError(f"{where}: image {path} cannot be read: {error.strerror}") from None


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
