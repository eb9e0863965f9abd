"""Describe how the gaps of a plan are compensated, as a value with a canonical text. Needs no torch."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from workers.errors import WorkersError
from workers.messages import NO_COMPENSATION
from workers.runtime.gaps import SCOPES, Scope

Kind = Literal["none", "linear"]
Weighting = Literal["uniform", "answers"]
Source = Literal["pruned", "dense"]

KINDS: tuple[Kind, ...] = get_args(Kind)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
SOURCES: tuple[Source, ...] = get_args(Source)
LARGEST_SEED = 2**32
OWN_TEXT = "own"
"""In place of a text's id: the model samples general text itself."""
_TEXT_ID = re.compile(r"[0-9a-f]{16}")


class CompensationError(WorkersError):
    """A compensation that cannot be read, fitted, found, or folded into a model; the message says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How linear maps are fitted, everything but the plan, the model and the calibration samples.

    Raises :class:`CompensationError` for values that mean nothing.
    """

    kind: Kind = "none"
    ridge: float = 1e-3
    """Pull of the maps towards the identity, relative to the mean squared entry of the projection's output."""
    weighting: Weighting = "answers"
    """How much a token's squared error counts: ``uniform`` the same for all; ``answers`` divided by the target's mean
    square, with vision tokens, the prompt's text and the tokens from which the answer is read weighing the same in
    total."""
    tokens: int = 16384
    """Calibration tokens: whole samples, one an image first, until this many are reached."""
    source: Source = "pruned"
    """Whose states the maps are fitted on: the pruned and so far compensated model's, or the dense model's (ReplaceMe,
    arXiv 2505.02819)."""
    seed: int = 0
    """Picks the tokens that are kept where the memory budget does not hold all."""
    drift: bool = False
    """Whether kept layers above the first gap have maps too, which take back what the gaps below have left."""
    scope: Scope = "output"
    """What a map is: one of what the MLP adds, ``[hidden, hidden]``, or (``projection``) a change of the MLP's whole
    last projection, ``[width, hidden]``."""
    text_share: float = 0.0
    """Share of the calibration tokens that are general text, and its weight beside the task's samples."""
    text_id: str = OWN_TEXT
    """Which general text: ``own``, sampled from the dense model with ``seed``, or the id of a given one."""

    def __post_init__(self) -> None:
        checked = (("kind", KINDS), ("weighting", WEIGHTINGS), ("source", SOURCES), ("scope", SCOPES))
        for name, known in checked:
            value = getattr(self, name)
            if value not in known:
                raise CompensationError(f"compensation {name} is one of {', '.join(known)}, not {value!r}")
        if not (isinstance(self.ridge, float) and math.isfinite(self.ridge) and self.ridge > 0):
            raise CompensationError(f"compensation ridge must be a number above 0, not {self.ridge!r}")
        if self.drift and self.source == "dense":
            raise CompensationError("compensation drift needs source pruned: dense states do not drift")
        if not (isinstance(self.text_share, float) and 0.0 <= self.text_share < 1.0):
            raise CompensationError(
                f"compensation text_share must be a number from 0 to below 1, not {self.text_share!r}"
            )
        if self.text_id != OWN_TEXT and not (isinstance(self.text_id, str) and _TEXT_ID.fullmatch(self.text_id)):
            raise CompensationError(
                f"compensation text_id is {OWN_TEXT} or 16 hexadecimal digits, not {self.text_id!r}"
            )
        if self.text_id != OWN_TEXT and not self.text_share:
            raise CompensationError("compensation text_id needs a text_share above 0")
        if not _is_integer(self.tokens) or self.tokens < 1:
            raise CompensationError(f"compensation tokens must be a whole number above 0, not {self.tokens!r}")
        if not _is_integer(self.seed) or not 0 <= self.seed < LARGEST_SEED:
            raise CompensationError(f"compensation seed must be a whole number below 2^32, not {self.seed!r}")

    @property
    def is_none(self) -> bool:
        """Whether skips stay plain."""
        return self.kind == "none"

    @property
    def text(self) -> str:
        """The canonical text: ``"none"``, or ``"linear ridge=0.001 weighting=answers tokens=16384"``.

        What comes after these three is written only where it is not the default.
        """
        if self.is_none:
            return NO_COMPENSATION
        parts = [self.kind, f"ridge={self.ridge!r}", f"weighting={self.weighting}", f"tokens={self.tokens}"]
        if self.source != "pruned":
            parts.append(f"source={self.source}")
        if self.seed:
            parts.append(f"seed={self.seed}")
        if self.drift:
            parts.append("drift=yes")
        if self.scope != "output":
            parts.append(f"scope={self.scope}")
        if self.text_share:
            parts.append(f"text_share={self.text_share!r}")
        if self.text_id != OWN_TEXT:
            parts.append(f"text_id={self.text_id}")
        return " ".join(parts)

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe's text; its settings may stand in any order and be left out where they are the default.

        Raises :class:`CompensationError` naming the part that is wrong.
        """
        if not isinstance(text, str) or not text.split():
            raise CompensationError(f"a compensation's text starts with one of {', '.join(KINDS)}, got {text!r}")
        kind, *settings = text.split()
        if kind not in KINDS:
            raise CompensationError(f"compensation {text!r}: starts with one of {', '.join(KINDS)}, not {kind!r}")
        if kind == "none" and settings:
            raise CompensationError(f"compensation {text!r}: none takes no settings")
        values: dict[str, Any] = {}
        for setting in settings:
            name, separator, value = setting.partition("=")
            if name not in _READERS or not separator:
                raise CompensationError(
                    f"compensation {text!r}: {setting!r} is no setting; known are {', '.join(_READERS)}, as name=value"
                )
            if name in values:
                raise CompensationError(f"compensation {text!r}: {name} is given twice")
            values[name] = _read(text, name, value)
        return cls(kind=kind, **values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _yes_or_no(value: str) -> bool:
    return {"yes": True, "no": False}[value]


_READERS: Mapping[str, Callable[[str], Any]] = {
    "ridge": float,
    "weighting": str,
    "tokens": int,
    "source": str,
    "seed": int,
    "drift": _yes_or_no,
    "scope": str,
    "text_share": float,
    "text_id": str,
}


def _read(text: str, name: str, value: str) -> Any:
    try:
        return _READERS[name](value)
    except (ValueError, KeyError):
        expected = {float: "a number", int: "a whole number", _yes_or_no: "yes or no"}[_READERS[name]]
        raise CompensationError(f"compensation {text!r}: {name} is {expected}, not {value!r}") from None


def id_of_text(text: str) -> str:
    """Return what names a text in a recipe: the beginning of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


NONE = Recipe()
"""Plain skips."""
