"""A criterion that is calibrated on the model itself: every action is tried at every layer, on half of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workers.redundancy.kinds import ANSWER
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, Thresholds
from .published import contributions

TRIAL = "trial_divergence"


@dataclass(frozen=True)
class Calibrated(Thresholds):
    """The divergence that an action causes alone, over the dense model's whole answer, over ``safe`` in nats."""

    safe: float = 0.01

    name = "calibrated"
    source = "skipplan, docs/theory.md; ShortV, arXiv 2504.00502 (freeze, first token, all samples)"
    needs: ClassVar[tuple[str, ...]] = ("trials",)
    published_for = ""

    def __post_init__(self) -> None:
        if not self.safe > 0:
            raise ValueError(f"safe must be above 0, not {self.safe:g}")

    def risk(self, table: LayerTable) -> Risk:
        measured = contributions(table, ANSWER, TRIAL)
        risk = {letter: tuple(value / self.safe for value in values) for letter, values in measured.items()}
        return Risk(self.name, risk, {letter: _errors(table, Action.of(letter)) for letter in risk})


def _errors(table: LayerTable, action: Action) -> tuple[float, ...]:
    """Return standard errors of the logarithm of the risk by layer, 0 where none is known."""
    rows = [table.row(f"{TRIAL}@{action.label}", ANSWER, layer) for layer in range(table.num_layers)]
    return tuple((row.standard_error or 0.0) / row.value if row is not None and row.value > 0 else 0.0 for row in rows)
