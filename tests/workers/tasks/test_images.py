"""What pixels mean, against arrays computed by hand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from workers.errors import ImageError
from workers.tasks.images import ImageFile, hash_image

Pixels = NDArray[Any]
ORIENTATION = 274
RNG = np.random.default_rng(0)
PHOTO: Pixels = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)

SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"} | {
    5: "left top",
    6: "right top",
    7: "right bottom",
    8: "left bottom",
}
"""The side at which the stored image's first row, and its first column, are seen (EXIF 2.3, table 6)."""


def upright(stored: Pixels, orientation: int) -> Pixels:
    row, column = SIDES[orientation].split()
    seen = stored if row in ("top", "bottom") else stored.swapaxes(0, 1)
    return seen[:: -1 if "bottom" in (row, column) else 1, :: -1 if "right" in (row, column) else 1]


def seen(path: Path) -> Pixels:
    image = ImageFile(str(path)).open()
    assert image.mode == "RGB"
    return np.asarray(image)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_a_photo_is_seen_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(Image.fromarray(PHOTO), tmp_path / f"a{suffix}", exif=turned(orientation), **options)
    assert np.array_equal(seen(path), upright(PHOTO, orientation))


def test_a_turned_jpeg_is_the_plain_one_turned(tmp_path: Path) -> None:
    photo = Image.fromarray(PHOTO)
    plain = seen(save(photo, tmp_path / "plain.jpg", quality=95))
    for orientation in SIDES:
        path = save(photo, tmp_path / f"{orientation}.jpg", quality=95, exif=turned(orientation))
        assert np.array_equal(seen(path), upright(plain, orientation))


def test_an_orientation_in_xmp_or_behind_the_pixels_counts(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    path = save(Image.fromarray(PHOTO), tmp_path / "xmp.png", pnginfo=info)
    assert np.array_equal(seen(path), upright(PHOTO, 6))
    late = tmp_path / "late.png"
    content = save(Image.fromarray(PHOTO), tmp_path / "plain.png").read_bytes()
    entry = b"eXIf" + turned(8).tobytes().removeprefix(b"Exif\0\0")
    chunk = (len(entry) - 4).to_bytes(4, "big") + entry + zlib.crc32(entry).to_bytes(4, "big")
    late.write_bytes(content[:-12] + chunk + content[-12:])  # before the end's chunk of 12 bytes
    assert np.array_equal(seen(late), upright(PHOTO, 8))


def test_a_damaged_exif_entry_turns_nothing(tmp_path: Path) -> None:
    path = save(Image.fromarray(PHOTO), tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff")
    assert np.array_equal(seen(path), PHOTO)


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint16, (3, 4)), st.sampled_from(["PNG", "TIFF", "PPM"]))
def test_sixteen_bits_are_scaled_by_their_range(values: Pixels, form: str) -> None:
    file = io.BytesIO()
    Image.fromarray(values).save(file, form)
    found = opened(file.getvalue())
    assert np.array_equal(found, np.repeat(np.rint(values / 65535 * 255).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("stored", ["uint8", ">u2", "int32", "int32 wide", "float of 1", "float of 255"])
def test_the_same_grey_is_seen_in_every_type(tmp_path: Path, stored: str) -> None:
    grey: Pixels = np.append(RNG.integers(0, 256, 62), [0, 255]).reshape(8, 8).astype(np.uint8)
    values = {
        "uint8": grey,
        ">u2": (grey.astype(np.uint16) * 257).astype(">u2"),
        "int32": grey.astype(np.int32),
        "int32 wide": grey.astype(np.int32) * 257,
        "float of 1": grey.astype(np.float32) / 255,
        "float of 255": grey.astype(np.float32),
    }[stored]
    assert np.array_equal(seen(save(Image.fromarray(values), tmp_path / "a.tiff"))[..., 0], grey)


@pytest.mark.parametrize("value", [-1.0, 256.0, float("nan"), float("inf")])
def test_values_in_no_known_range_are_refused(tmp_path: Path, value: float) -> None:
    path = save(Image.fromarray(np.array([[0.0, value]], dtype=np.float32)), tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=r"a\.tiff cannot be decoded: its values .* go from .* in 0 to 1 or in"):
        ImageFile(str(path)).open()
    path = save(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), tmp_path / "b.tiff")
    with pytest.raises(ImageError, match="go from 0 to 70000; they must lie in 0 to 255 or in 0 to 65535"):
        ImageFile(str(path)).open()


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint8, (3, 4, 4)))
def test_what_is_transparent_is_white_whatever_colour_it_hides(pixels: Pixels) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(opened(file.getvalue()) - expected).max() <= 1.0  # Pillow rounds
    opaque = pixels.copy()
    opaque[..., 3] = 255
    file = io.BytesIO()
    Image.fromarray(opaque).save(file, "PNG")
    assert np.array_equal(opened(file.getvalue()), opaque[..., :3])


@pytest.mark.parametrize("mode", ["LA", "PA", "P", "L", "RGB", "1", "I;16"])
def test_transparency_of_every_kind_is_white(tmp_path: Path, mode: str) -> None:
    """The left pixel is visible, the right one hides another colour."""
    options: dict[str, Any] = {}
    if mode == "LA":
        image = Image.fromarray(np.array([[[40, 255], [80, 0]]], dtype=np.uint8))
    elif mode == "I;16":
        image, options = Image.fromarray(np.array([[40 * 257, 80 * 257]], dtype=np.uint16)), {"transparency": 80 * 257}
    elif mode in ("P", "PA"):
        image, options = Image.new("P", (2, 1)), {"transparency": 1}
        image.putpalette([40, 40, 40, 80, 80, 80])
        image.putpixel((1, 0), 1)
    else:
        image = Image.new(mode, (2, 1), {"L": 40, "RGB": (40, 40, 40), "1": 1}[mode])
        image.putpixel((1, 0), {"L": 80, "RGB": (80, 80, 80), "1": 0}[mode])
        options = {"transparency": {"L": 80, "RGB": (80, 80, 80), "1": 0}[mode]}
    path = tmp_path / ("a.gif" if mode == "PA" else "a.png")
    assert seen(save(image, path, **options))[0, :, 0].tolist() == [255 if mode == "1" else 40, 255]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, bits: int, kind: int, row: bytes, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of one row of what Pillow cannot write: grey (kind 0), colour (2), grey or colour with alpha (4, 6)."""
    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    hidden = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + hidden + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(4, 2, 0, bytes([0b00011011])), [0, 85, 170, 255]),
        (png(4, 2, 0, bytes([0b00011011]), (1,)), [0, 255, 170, 255]),
        (png(4, 4, 0, bytes([0x05, 0xAF]), (5,)), [0, 255, 170, 255]),
        (png(8, 1, 0, bytes([0b10101010]), (0,)), [255] * 8),
    ],
)
def test_grey_of_few_bits_is_scaled_and_its_transparent_value_white(content: bytes, expected: list[int]) -> None:
    assert opened(content)[0, :, 0].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint16, (3, 4)), st.integers(0, 2))
def test_sixteen_bits_a_colour_are_scaled_and_what_is_transparent_is_white(pixels: Pixels, hidden: int) -> None:
    """Pillow leaves out the lower byte, so that a value may be one less."""
    pixels[:, 3] = 65535
    expected = np.rint(pixels[None, :, :3] / 257)
    opaque = pixels[:, :3].astype(">u2").tobytes()
    assert np.abs(opened(png(3, 16, 2, opaque)) - expected).max() <= 1
    pixels[hidden, 3] = 0
    alike = (pixels[:, :3] >> 8 == pixels[hidden, :3] >> 8).all(axis=1)
    for content, white in (
        (png(3, 16, 6, pixels.astype(">u2").tobytes()), pixels[:, 3] == 0),
        (png(3, 16, 2, opaque, tuple(pixels[hidden, :3].tolist())), alike),
    ):
        assert np.abs(opened(content) - np.where(white[None, :, None], 255, expected)).max() <= 1
    grey = pixels[:, [0, 3]].astype(">u2").tobytes()
    assert np.abs(opened(png(3, 16, 4, grey)) - np.where(pixels[:, 3:] == 0, 255, expected[..., :1])).max() <= 1


def test_the_first_frame_of_an_animation_is_seen(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert seen(path)[0, 0].tolist() == [255, 0, 0]


def test_inks_and_bits_are_seen_as_colours(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for suffix in ("jpg", "tiff"):  # Pillow writes a JPEG with Adobe's marker, and so inverted
        assert np.abs(seen(save(cmyk, tmp_path / f"a.{suffix}")).astype(int) - [255, 0, 0]).max() <= 3
    bits = Image.fromarray(np.array([[True, False]]))
    assert seen(save(bits, tmp_path / "bits.png"))[0].tolist() == [[255] * 3, [0] * 3]


def test_ordinary_images_are_read_as_ever(tmp_path: Path) -> None:
    for mode in ("RGB", "L", "1", "P", "CMYK"):
        for suffix in ("png", "jpg", "tiff", "webp", "bmp"):
            path = tmp_path / f"{mode}.{suffix}"
            try:
                save(Image.fromarray(PHOTO).convert(mode), path)
            except OSError:  # not a mode of that format
                continue
            with Image.open(path) as image:
                if image.mode == mode:
                    assert np.array_equal(seen(path), np.asarray(image.convert("RGB"))), path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "its format is not known"),
        (b"\x89PNG\r\n\x1a\n", "its format is not known"),
        (None, "truncated"),
    ],
)
def test_what_is_no_image_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = save(Image.fromarray(PHOTO).resize((300, 300)), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ImageError, match=rf"a\.jpg cannot be decoded: .*{message}") as caught:
        ImageFile(str(path)).open()
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_an_image_that_would_fill_the_memory_is_one_line(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(Image.fromarray(PHOTO), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO[..., 0].size - 1)
    assert seen(path).shape == PHOTO.shape
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO[..., 0].size // 3)
    with pytest.raises(ImageError, match=r"a\.png cannot be decoded: Image size \(54 pixels\) exceeds limit"):
        ImageFile(str(path)).open()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused_in_one_line(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, form, exif=turned(6)) if form in ("PNG", "JPEG") else Image.fromarray(PHOTO).save(
        file, form
    )
    content = bytearray(file.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        opened(bytes(content))
    except ImageError as error:
        assert "\n" not in str(error)


def opened(content: bytes) -> Pixels:
    from workers.tasks.images import _decode

    return np.asarray(_decode(content, "image")).astype(np.uint8)


def test_an_image_that_was_replaced_since_the_task_was_read_is_no_answer_to_its_question(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png")
    image = ImageFile(str(path), hash_image(path, "row 1"))
    assert np.array_equal(np.asarray(image.open()), seen(path))
    save(Image.new("RGB", (4, 4), "blue"), path)
    with pytest.raises(ImageError, match=r"a\.png cannot be decoded: it is another image than when the task was read"):
        image.open()
