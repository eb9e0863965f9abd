"""Define a sample: a question about an image, with the answers that count as right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.errors import TaskError

from .images import ImageReference


@dataclass(frozen=True)
class Document:
    """The document of a harness's task that a sample was read from, by which that harness scores its answers."""

    number: int
    hash: str
    """Of all its fields."""


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
    document: Document | None = None
    """Where a harness scores the answers."""

    @property
    def content(self) -> list[Any]:
        """Fields that its score depends on, as JSON holds them."""
        options = [list(self.choices)] if self.choices else []
        scored_by = [self.document.hash] if self.document is not None else []
        return [self.image_key, self.question, list(self.answers), *options, *scored_by]

    def __post_init__(self) -> None:
        if not any(answer.strip() for answer in self.answers):
            raise TaskError(f"sample {self.id} has no answer")
