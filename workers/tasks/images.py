"""Find, hash and open the images of samples; :func:`read_image` decides what their pixels mean."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import ImageError, TaskError
from workers.text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

READING = 2
"""Version of :func:`read_image`; in 1, pixels were what ``Image.convert("RGB")`` makes of them."""
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 274, 258, 262, 0  # tags of TIFF and EXIF
_BYTE, _WORD = 255, 65535
_SCALED: dict[str, Callable[[int], int]] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}
"""How Pillow brings the values of a PNG to 8 bits, by its raw mode, where the transparent one stays as it is stored."""


@dataclass(frozen=True)
class ImageFile:
    """Image in a file of its own."""

    path: str
    key: str = ""
    """Hash that the file had when the task was read; empty: not known."""

    def open(self) -> Image:
        """Decode the image as RGB. Raises ImageError naming the file, also where it is another one by now."""
        return _decode(Path(self.path), f"image {self.path} cannot be decoded", self.key)


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
class RenderedImage:
    """Image that is drawn from a rendered text's number."""

    index: int
    seed: int

    def open(self) -> Image:
        """Draw the text."""
        from .rendered import rendered_text

        return rendered_text(self.index, self.seed).image


@dataclass(frozen=True)
class HubImage:
    """Image in one row of a dataset of the Hugging Face hub (or of a directory that ``datasets`` can load)."""

    dataset: str
    subset: str | None
    split: str
    revision: str | None
    column: str
    row: int
    key: str = ""
    """As of :class:`ImageFile`."""

    def open(self) -> Image:
        """Decode the image as RGB. Raises ImageError naming dataset and row, also where it is another one by now."""
        stored = _hub_images(self.dataset, self.subset, self.split, self.revision, self.column)[self.row][self.column]
        source = Path(stored["path"]) if stored.get("bytes") is None else stored["bytes"]
        return _decode(source, f"dataset {self.dataset}, row {self.row}: cannot decode", self.key)


@lru_cache(maxsize=4)
def _hub_images(dataset: str, subset: str | None, split: str, revision: str | None, column: str) -> Any:
    return load_undecoded(dataset, subset, split, revision, column)


ImageReference = ImageFile | SceneImage | RenderedImage | HubImage


def _decode(source: Path | bytes, problem: str, key: str = "") -> Image:
    from PIL import Image, UnidentifiedImageError

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice that size is an error
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if key and hashlib.sha256(content).hexdigest() != key:
            raise ValueError("it is another image than when the task was read")
        with Image.open(io.BytesIO(content)) as image:
            return read_image(image)
    except UnidentifiedImageError:
        raise ImageError(f"{problem}: {'its format is not known' if content else 'it is empty'}") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise all kinds, by format
        raise ImageError(f"{problem}: {one_line(error)}") from None


def read_image(image: Image) -> Image:
    """Return an opened image's first frame in RGB as a viewer shows it: upright, transparent parts on white.

    The orientation is that of EXIF or XMP. Grey values of more than 8 bits are scaled by their range. Colour profiles
    are not applied, nor do the processors of transformers apply them.

    Raises:
        ValueError: grey values outside every range that could be meant.
    """
    from PIL import Image

    tiles = getattr(image, "tile", ()) if image.format == "PNG" else ()
    stored = tiles[0][3] if tiles else None
    image.load()
    if "transparency" in image.info and stored in _SCALED:
        image.info["transparency"] = _scaled(image.info["transparency"], _SCALED[stored])
    turn = _turn(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_bytes(image)
    elif image.mode == "La":  # Pillow has no way from here to RGB
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _scaled(value: int | tuple[int, ...], scale: Callable[[int], int]) -> int | tuple[int, ...]:
    return tuple(map(scale, value)) if isinstance(value, tuple) else scale(value)


def _turn(image: Image) -> Any:
    """Return the transposition that sets an image upright, None where it is."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged entry turns nothing, in viewers neither
        return None


def _to_bytes(image: Image) -> Image:
    """Scale grey values of modes I;16, I and F to 8 bits, with transparency as LA where one value stands for it.

    16 bits by 65535 (TIFF: by the bits that it says it uses); whole numbers of 32 bits and floats by the smallest of
    1 (floats), 255 and 65535 (whole numbers) that none exceeds.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        (bits, *_) = tags.get(_BITS_PER_SAMPLE) or (16,)
        top = 2**bits - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = top - values
    else:
        ranges = (1, _BYTE) if image.mode == "F" else (_BYTE, _WORD)
        lowest, highest = values.min(), values.max()
        fitting = [top for top in ranges if lowest >= 0 and highest <= top]  # none for NaN
        if not fitting:
            raise ValueError(
                f"its values of 32 bits go from {lowest:g} to {highest:g}; they must lie in "
                f"{' or in '.join(f'0 to {top}' for top in ranges)}"
            )
        top = _WORD if image.format == "PPM" and image.mode == "I" else fitting[0]  # Pillow has scaled these
    grey = Image.fromarray(np.rint(values * (_BYTE / top)).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(np.asarray(image) == image.info["transparency"], 0, _BYTE).astype(np.uint8)
        return Image.merge("LA", (grey, Image.fromarray(alpha)))
    return grey


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
