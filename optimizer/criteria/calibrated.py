"""A criterion that is calibrated on the model itself: every action is tried at every layer, on few samples.

What few samples show is noisy, so two measurements of the same trials are combined, and the order is drawn a little
towards that of published criteria, which need no trial. ``docs/theory.md`` says on which models this was chosen, and on
which it was judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from workers.redundancy.kinds import ANSWER
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, Thresholds
from .published import Angular, BlockInfluence, Cosine, EarlyExit, contributions

Floats = NDArray[np.float64]

COMBINED = (Cosine, BlockInfluence, Angular, EarlyExit)
"""Criteria whose ranks are averaged: published ones that read the dense pass alone, or nothing."""
PULL = 0.3
"""How far the order is drawn to theirs, in standard deviations of the logarithm of what was measured."""
MEASURED = ("trial_divergence", "trial_odds")


@dataclass(frozen=True)
class Calibrated(Thresholds):
    """Geometric mean of the divergence that an action causes and of the squared change of the answer's log odds.

    The divergence is what harm is measured by, and hangs on the few samples whose answers change; the odds move in
    all of them. Times a factor of the layer's mean rank under published criteria, over ``safe``.
    """

    safe: float = 0.1

    name = "calibrated"
    source = "skipplan, docs/theory.md"
    needs: ClassVar[tuple[str, ...]] = ("distance", "angular", "trials")
    published_for = ""

    def __post_init__(self) -> None:
        if not self.safe > 0:
            raise ValueError(f"safe must be above 0, not {self.safe:g}")

    def risk(self, table: LayerTable) -> Risk:
        published = [kind().risk(table) for kind in COMBINED]
        tried = [contributions(table, ANSWER, name) for name in MEASURED]
        risk, layers = {}, range(table.num_layers)
        for letter in tried[0]:
            measured = np.sqrt(np.prod([each[letter] for each in tried], axis=0))
            logs = np.log(measured[(measured > 0) & np.isfinite(measured)])
            pull = PULL * float(logs.std()) if len(logs) else 0.0
            ranks = np.mean([normal_scores([each.of(layer, letter) for layer in layers]) for each in published], axis=0)
            risk[letter] = tuple((measured * np.exp(pull * ranks) / self.safe).tolist())
        return Risk(self.name, risk, {letter: _errors(table, Action.of(letter)) for letter in risk})


def _errors(table: LayerTable, action: Action) -> tuple[float, ...]:
    """Return standard errors of the logarithm of the risk, as if both measurements erred alike; 0 where it is known."""

    def of(layer: int) -> float:
        rows = [table.row(f"{name}@{action.label}", ANSWER, layer) for name in MEASURED]
        relative = [(row.standard_error or 0.0) / row.value for row in rows if row is not None and row.value > 0]
        return math.fsum(relative) / len(MEASURED)

    return tuple(of(layer) for layer in range(table.num_layers))


def normal_scores(values: Sequence[float]) -> Floats:
    """Return normal quantiles of the ranks, ties at their mean."""
    scores: Floats = norm.ppf((rankdata(values) - 0.5) / len(values))
    return scores
