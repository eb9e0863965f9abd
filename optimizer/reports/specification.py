"""What a stored job was asked, read so that jobs of every version can be shown: a field that is not there is absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specification:
    """The parts of a job's specification that reports name; the whole of it stands in the provenance."""

    model: str
    revision: str | None
    task: str
    limits: dict[str, float] = field(default_factory=dict)
    """The constraint's numbers by field, those that were set."""
    search: dict[str, Any] = field(default_factory=dict)
    criterion: str | None = None
    """None for jobs of before criteria had names."""
    thresholds: dict[str, float] | None = None
    compensation: str = "none"

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Specification:
        """Read what ``jobs.spec`` holds."""
        model = _section(stored, "model")
        limits = {
            name: float(value)
            for name, value in _section(stored, "constraint").items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        return cls(
            model=str(model.get("path", "unknown model")),
            revision=model.get("revision"),
            task=str(stored.get("task", "unknown task")),
            limits=limits,
            search=_section(stored, "search"),
            criterion=stored.get("criterion"),
            thresholds=stored.get("thresholds"),
            compensation=str(_section(stored, "compensation").get("kind", "none")),
        )

    @property
    def max_accuracy_drop(self) -> float | None:
        """Largest loss of accuracy as a share; None where the job set no limit."""
        return self.limits.get("max_accuracy_drop")

    @property
    def strategy(self) -> str:
        """The search in a few words: its strategy (formerly the sampler) and seed."""
        name = self.search.get("strategy") or self.search.get("sampler") or "search"
        seed = self.search.get("seed")
        return str(name) if seed is None else f"{name}, seed {seed}"


def _section(stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = stored.get(name)
    return dict(found) if isinstance(found, Mapping) else {}
