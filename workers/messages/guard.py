"""Fitting guards, and what they send to the dense model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.tasks import Task


@dataclass(frozen=True)
class FitGuards:
    """Fit guards that read where ``layers`` begin, at a rate of false alarms, and measure what they send away.

    Beside the task's own held-out samples ask those of other ``tasks``, one about each image of the first ``samples``,
    and at most ``samples`` pieces of ``text`` about the task's images.
    """

    layers: tuple[int, ...]
    false_alarms: float
    tasks: tuple[Task, ...] = ()
    text: str | None = None
    samples: int | None = None


@dataclass(frozen=True)
class SentAway:
    """Prompts that were asked, and how many of them a guard sends to the dense model."""

    prompts: int
    sent: int

    @property
    def share(self) -> float:
        """The share that is sent to the dense model; NaN of none."""
        return self.sent / self.prompts if self.prompts else float("nan")


@dataclass(frozen=True)
class FittedGuard:
    """A fitted guard as the content of a safetensors file, and what was measured of it.

    ``decision_seconds`` are from a prompt's inputs to the decision, ``score_seconds`` those of the score alone.
    """

    layer: int
    content: bytes
    fitted_on: int
    threshold_on: int
    held_out: SentAway
    tasks: dict[str, SentAway]
    text: SentAway | None
    decision_seconds: float
    score_seconds: float


@dataclass(frozen=True)
class FittedGuards:
    """Reply to :class:`FitGuards`, in the order of its layers, and why samples were left out, by split."""

    guards: tuple[FittedGuard, ...]
    failed_samples: dict[str, dict[str, str]] = field(default_factory=dict)
