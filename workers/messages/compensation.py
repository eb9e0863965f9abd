"""Fitting maps, files of fitted maps, and how linear layers are."""

from __future__ import annotations

from dataclasses import dataclass, field

NO_COMPENSATION = "none"
"""In place of a recipe's text: the skips of a plan stay plain."""


@dataclass(frozen=True)
class Artifact:
    """Name a file of fitted maps, which is too large for the database: a path or an fsspec URL, and its SHA-256."""

    location: str
    checksum: str


@dataclass(frozen=True)
class FitCompensation:
    """Fit the maps of a plan's gaps on the calibration split; ``compensation`` is the text of a recipe.

    ``text`` is the general text of a recipe that names one.
    """

    plan: str
    compensation: str
    text: str | None = None


@dataclass(frozen=True)
class GapShare:
    """Shares of the dense model's state behind a gap (energy, calibration tokens) that are left unexplained.

    The gap lies behind ``layer`` and ends with the skipped layer ``end``. ``plain_share`` is left by the plain skip,
    the gaps below being compensated, and ``unexplained`` by the best map.
    """

    layer: int
    end: int
    plain_share: float
    unexplained: float


@dataclass(frozen=True)
class FittedCompensation:
    """A plan's fitted maps as the content of a safetensors file, how well they fit, and the time that fitting took."""

    plan: str
    compensation: str
    content: bytes
    gaps: tuple[GapShare, ...]
    tokens: int
    text_tokens: int
    """Of these, tokens of general text."""
    samples: int
    seconds: float
    failed_samples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasureLinearRedundancy:
    """Measure the linear redundancy of all pairs of layers on the calibration split; ``ridge`` as in a recipe."""

    ridge: float = 1e-3


@dataclass(frozen=True)
class LinearRedundancy:
    """Unexplained shares by kept and last skipped layer, over so many calibration tokens, and why layers have none."""

    shares: tuple[GapShare, ...]
    tokens: int
    refusals: dict[int, str]
    failed_samples: dict[str, str] = field(default_factory=dict)
