"""Cut general text into passages, which plans are scored on beside a task's samples."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property

from workers.errors import TaskError

from .splits import SPLITS

TEXT = "text"
"""Name of general text among what plans are scored on."""
PASSAGE_LENGTH = 1_000
"""Most characters of a passage, unless its first word alone is longer."""
MOST_PASSAGES, LEAST_PASSAGES = 32, 4
"""Of each split."""
_PIECE = re.compile(rf"\S(?:.{{0,{PASSAGE_LENGTH - 2}}}\S)?(?!\S)|\S+", re.DOTALL)
"""As many whole words as a passage holds, or one that is longer."""
PASSAGES_VERSION = 1
"""Raised when the same text is cut into other passages, or a passage scored in another way
(``workers/evaluation/passages.py``)."""


@dataclass(frozen=True)
class Passage:
    """A piece of general text; ``id`` is ``text-7`` for the eighth of the text."""

    id: str
    text: str

    @property
    def content(self) -> list[str]:
        """Fields that its score depends on, as JSON holds them."""
        return [self.text]

    @cached_property
    def image_key(self) -> str:
        """A hash of its content, in the place of an image's: passages are resampled as whole images are."""
        return _hash_text(self.text)


@dataclass(frozen=True)
class TextTask:
    """General text as something to score plans on: how far they predict the next token as the dense model does.

    ``data_hash`` covers the whole text, ``split_hash`` the passages of each split in order, ``definition_hash`` how it
    is cut and scored.
    """

    search: tuple[Passage, ...]
    held_out: tuple[Passage, ...]
    data_hash: str
    calibration: tuple[Passage, ...] = ()
    """None: nothing is fitted to it."""

    @classmethod
    def of(cls, text: str) -> TextTask:
        """Cut a text at white space into passages of about 1,000 characters, every other one for the search split.

        At most 32 of each split are kept, evenly over the text; each split is in the order of a hash, so that its first
        n are a random subset. A passage that is there already, and an end of less than half the length, are left out.

        Raises:
            TaskError: fewer than 4 passages for each split.
        """
        passages = [Passage(f"{TEXT}-{number}", own) for number, own in enumerate(dict.fromkeys(_cut(text)))]
        most = min(2 * MOST_PASSAGES, len(passages))
        chosen = [passages[number * len(passages) // most] for number in range(most)]
        if len(chosen) < 2 * LEAST_PASSAGES:
            raise TaskError(
                f"the text has {len(passages)} passages of about {PASSAGE_LENGTH} characters, "
                f"{2 * LEAST_PASSAGES} are needed (half are searched on, half held out); give a longer text"
            )
        search, held_out = (tuple(sorted(chosen[half::2], key=lambda each: each.image_key)) for half in (0, 1))
        return cls(search, held_out, _hash_text(text))

    @property
    def name(self) -> str:
        return TEXT

    @property
    def split_hash(self) -> str:
        return _hash_text(
            json.dumps({name: [[each.id, each.image_key] for each in self.split(name)] for name in SPLITS})
        )

    @property
    def definition_hash(self) -> str:
        return _hash_text(json.dumps([TEXT, PASSAGES_VERSION, PASSAGE_LENGTH]))

    def split(self, name: str) -> tuple[Passage, ...]:
        """Return the passages of a split. Raises TaskError for an unknown name."""
        if name not in SPLITS:
            raise TaskError(f"{TEXT}: no split {name!r}; there are {', '.join(SPLITS)}")
        passages: tuple[Passage, ...] = getattr(self, name)
        return passages


def _cut(text: str) -> list[str]:
    pieces = _PIECE.findall(text)
    return pieces[:-1] if pieces and len(pieces[-1]) < PASSAGE_LENGTH // 2 else pieces


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
