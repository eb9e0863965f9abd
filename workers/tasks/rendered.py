"""Draw short texts to read: images of one common word or one number of up to four digits.

`rendered_text(index, seed)` is a pure function of its two arguments and of Pillow's own font, so a range of indices is
a data set that needs no files. Half of the images show a word of `WORDS`, half a number, of one to four digits equally
often. Size, line, place in the line and colours vary; the text lies inside the image and is clearly lighter or darker
than its background.

Indices below `FIRST_EVALUATION_INDEX` are for training the reference model, the ones from there on for evaluation. A
quarter of the numbers of three and four digits appear from there on only (`is_reserved`).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from workers.errors import TaskError

from .scenes import FIRST_EVALUATION_INDEX, IMAGE_SIZE

PROMPT = "what does it say?"

_WORD_LIST = """
    able acid age ago air aim arm army art ask back bad bag ball band bank base bed bell best big bill bird blue
    boat body bone book box boy bus buy cake call calm camp car card care case cat cell city club coal coat coin
    cold cost cow crop cup cut dark data date day dead deal deep desk dog door down draw dry dust east easy edge egg
    end exit eye face fact fall farm fast fat fear film fine fire fish five flag flat fly food foot four free full
    game gas gate gift girl goal gold good gray grow gun hair half hall hand hard hat head heat help high hill home
    hope hot hour huge ice idea iron joke joy jump key kid kind king knee lake lamp land late law leaf left leg lion
    list long lost loud love low luck mail main map mark meal meat milk mind moon name neck new news note oil old
    open page pain park past pink plan play pool poor post rain read red rice rich ring road rock roof room root
    rose rule safe salt sand save sea seat shoe shop sky slow snow soft soil song soup star sun tail tall tea ten
    thin top town tree true two view wall war warm wave weak week west wet wide wife wild wind wine wing wise wood
    word work year zero
"""

WORDS = tuple(_WORD_LIST.split())
"""The words drawn: common, three or four letters, each one token of SmolLM2's within a sentence."""

SIZES = (16, 18, 20)
"""Font sizes in pixels; a text is drawn in one of those in which it fits."""

LINES = (18, 26, 34, 42, 50, 58)
"""Where the base line of a text may lie, in pixels from the top, up to `_JITTER` higher or lower."""

_BASE_LINE = "ls"
_DIGITS = (1, 2, 3, 4)
_RESERVED_SHARE = 0.25
_FIRST_RESERVED = 100
_MARGIN = 2
_JITTER = 1
_DARK = (0, 95)
_LIGHT = (165, 255)


@dataclass(frozen=True)
class RenderedText:
    """An image of `IMAGE_SIZE` squared RGB pixels, its text, and where that stands.

    box: left, top, right and bottom of the text in pixels; right and bottom are the first beyond it. centres: the
    horizontal middle of each character in pixels.
    """

    image: Image.Image
    text: str
    box: tuple[int, int, int, int]
    centres: tuple[float, ...]


def rendered_text(index: int, seed: int) -> RenderedText:
    """Draw text number `index` of the endless data set `seed`.

    Raises:
        ValueError: if `index` is negative.
        TaskError: if Pillow was built without FreeType.
    """
    if index < 0:
        raise ValueError(f"text index {index} is negative; it must be 0 or more")
    rng = random.Random(f"rendered-text:{seed}:{index}")
    text = _choose(rng, training=index < FIRST_EVALUATION_INDEX)
    room = IMAGE_SIZE - 2 * _MARGIN
    font = rng.choice([font for font in map(_font, SIZES) if _width(font, text) <= room])
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text, anchor=_BASE_LINE))
    x = rng.randint(_MARGIN, IMAGE_SIZE - _MARGIN - (right - left)) - left
    y = rng.choice(LINES) + rng.randint(-_JITTER, _JITTER)
    ranges = [_DARK, _LIGHT]
    rng.shuffle(ranges)
    ink, background = (tuple(rng.randint(*ends) for _ in range(3)) for ends in ranges)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    ImageDraw.Draw(image).text((x, y), text, font=font, fill=ink, anchor=_BASE_LINE)
    ends = [font.getlength(text[:length]) for length in range(len(text) + 1)]
    centres = tuple(x + (start + end) / 2 for start, end in itertools.pairwise(ends))
    return RenderedText(image, text, (x + left, y + top, x + right, y + bottom), centres)


def is_reserved(number: int) -> bool:
    """Whether a number is never drawn for training: a quarter of those of three and four digits."""
    return number >= _FIRST_RESERVED and random.Random(f"reserved:{number}").random() < _RESERVED_SHARE


def _choose(rng: random.Random, *, training: bool) -> str:
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    digits = rng.choice(_DIGITS)
    while True:
        number = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        if not (training and is_reserved(number)):
            return str(number)


def _width(font: ImageFont.FreeTypeFont, text: str) -> float:
    left, _, right, _ = font.getbbox(text)
    return right - left


@lru_cache(maxsize=len(SIZES))
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, laid out without Raqm, which is not everywhere."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TaskError("source.kind rendered-text needs Pillow with FreeType, as its wheels on PyPI have it")
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
