"""A criterion that is calibrated on the model itself: few real removals say how far other criteria are to be trusted.

The divergence that each action alone causes is modelled, as a logarithm, by a Gaussian process over layers and actions
(Rasmussen and Williams 2006, section 2.7; the model is this project's): an offset for each action, a sum of criteria's
ranks with weights of at least 0, which actions share, and what is left, which neighbouring layers and related actions
share. The weights are drawn towards ``skip-it`` alone, so that without removals the order is its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import norm, rankdata

from workers.redundancy.kinds import ANSWER, TRIED
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import MEASURED_LETTERS, Risk, Thresholds
from .published import Angular, BlockInfluence, Cosine, EarlyExit
from .skip_it import SkipIt

Floats = NDArray[np.float64]
Place = tuple[str, int]
"""An action's letter and a layer."""

COMBINED = (SkipIt, Cosine, BlockInfluence, Angular, EarlyExit)
"""Criteria whose ranks are combined, the first of them the prior."""
WEIGHT_SPREAD = 0.15
"""Standard deviation of a weight before anything is measured; divergences are over those of removals."""
REST_SPREAD = 0.5
"""Standard deviation of what ranks leave unexplained."""
SMOOTH = 0.5
"""Share of its variance that neighbouring layers share."""
REACH = 1.5
"""Layers over which they do."""
RELATED = {frozenset("SB"): 0.9, frozenset("BF"): 0.2, frozenset("SF"): 0.1}
"""Correlation between the rests of two actions: bypass takes a part of what skip takes."""
NOISE = 0.1
"""Least standard deviation of a measured value: other samples than the calibration's."""
OFFSET_SPREAD = 20.0


@dataclass(frozen=True)
class Calibrated(Thresholds):
    """Skip: mostly the divergence that removing the layer causes, which propagation measures at every layer anyway.

    Bypass and freeze: from an eighth of the layers each, and from removals and criteria for the others. Risk is the
    predicted divergence in nats over ``safe``, and 0 where ``skip-it`` knows that an action does nothing.
    """

    safe: float = 0.01

    name = "calibrated"
    source = "skipplan, docs/theory.md"
    needs: ClassVar[tuple[str, ...]] = (*SkipIt.needs, "trials")
    published_for = ""

    def __post_init__(self) -> None:
        if not self.safe > 0:
            raise ValueError(f"safe must be above 0, not {self.safe:g}")

    def risk(self, table: LayerTable) -> Risk:
        model = _Model.of(table)
        layers = range(table.num_layers)
        everywhere = [(letter, layer) for letter in MEASURED_LETTERS for layer in layers]
        centre, spread = model.predict(everywhere)
        unseen = np.empty(len(everywhere))
        for layer in layers:
            own = [index for index, place in enumerate(everywhere) if place[1] == layer]
            unseen[own] = model.without(layer).predict([everywhere[index] for index in own])[0]
        nothing = {(letter, layer) for letter, layer in everywhere if model.prior.of(layer, letter) == 0}

        def by_letter(values: Floats, known: float | None = None) -> dict[str, tuple[float, ...]]:
            found = dict(zip(everywhere, values.tolist(), strict=True))
            if known is not None:
                found |= dict.fromkeys(nothing, known)
            return {letter: tuple(found[letter, layer] for layer in layers) for letter in MEASURED_LETTERS}

        return Risk(
            self.name,
            by_letter(np.exp(centre) / self.safe, 0.0),
            spread=by_letter(spread),
            unseen=by_letter(np.exp(unseen) / self.safe, 0.0),
        )


@dataclass(frozen=True)
class _Model:
    """A Gaussian process over places (action and layer): ranks of them all, logarithms of harm measured at some."""

    prior: Risk
    ranks: dict[str, Floats]
    """By letter ``[layers, criteria]``."""
    places: tuple[Place, ...]
    values: Floats
    """Logarithms of divergences at ``places``, and their standard errors."""
    errors: Floats

    @classmethod
    def of(cls, table: LayerTable) -> _Model:
        """Read a table. Raises MeasurementError when a criterion's measurement, or every removal, is missing."""
        risks = [kind().risk(table) for kind in COMBINED]
        ranks = {
            letter: np.stack([_normal_scores(risk.risk[letter]) for risk in risks], axis=1)
            for letter in MEASURED_LETTERS
        }
        names = {Action.SKIP.letter: "final_divergence"}
        names |= {action.letter: f"trial_divergence@{action.label}" for action in TRIED}
        table.values("final_divergence", ANSWER, default=0.0 if table.has("final_divergence", ANSWER) else None)
        found = [
            (letter, layer, row)
            for letter, name in names.items()
            for layer in range(table.num_layers)
            if (row := table.row(name, ANSWER, layer)) is not None and row.value > 0
        ]
        places = tuple((letter, layer) for letter, layer, _ in found)
        logs = np.array([math.log(row.value) for _, _, row in found])
        relative = np.array([min(1.0, (row.standard_error or 0.0) / row.value) for _, _, row in found])
        return cls(risks[0], ranks, places, logs, relative)

    @property
    def scale(self) -> float:
        """Standard deviation of the logarithms of removals: what weights and spreads are multiples of."""
        removals = self.values[[letter == Action.SKIP.letter for letter, _ in self.places]]
        return float(removals.std()) or 1.0

    def without(self, layer: int) -> _Model:
        """Return the model that has seen nothing of a layer."""
        kept = [index for index, place in enumerate(self.places) if place[1] != layer]
        places = tuple(self.places[index] for index in kept)
        return replace(self, places=places, values=self.values[kept], errors=self.errors[kept])

    def predict(self, places: Sequence[Place]) -> tuple[Floats, Floats]:
        """Logarithm of the divergence at places, and its standard error."""
        scale = self.scale
        values, errors = self.values / scale, self.errors / scale
        covariance = _covariance(self.places, self.places) + np.diag(errors**2 + NOISE**2)
        factor = np.linalg.cholesky(covariance)
        design = self._design(self.places)
        whitened = np.linalg.solve(factor, design)
        # Weights are at least 0; offsets are not, so that each is a difference of two that are.
        criteria = len(COMBINED)
        offsets = whitened[:, criteria:]
        spreads = np.array([WEIGHT_SPREAD] * criteria + [OFFSET_SPREAD] * 2 * offsets.shape[1])
        wanted = np.zeros(len(spreads))
        wanted[0] = 1.0
        weights, _ = nnls(
            np.vstack([np.hstack([whitened, -offsets]), np.diag(1 / spreads)]),
            np.concatenate([np.linalg.solve(factor, values), wanted / spreads]),
        )
        up, down = np.split(weights[criteria:], 2)
        beta = np.concatenate([weights[:criteria], up - down])
        between = _covariance(places, self.places)
        left = np.linalg.solve(covariance, values - design @ beta)
        centre = self._design(places) @ beta + between @ left
        # What is not known of the weights adds to what is not known of the rest.
        precision = whitened.T @ whitened + np.diag(1 / spreads[: design.shape[1]] ** 2)
        seen = np.linalg.solve(covariance, between.T)
        lever = self._design(places) - seen.T @ design
        variance = np.diag(_covariance(places, places)) - (between * seen.T).sum(1)
        variance = variance + (lever * np.linalg.solve(precision, lever.T).T).sum(1)
        return scale * centre, scale * np.sqrt(np.maximum(variance, 0.0))

    def _design(self, places: Sequence[Place]) -> Floats:
        """``[places, criteria + actions]``: ranks, and which action it is."""
        ranks = np.array([self.ranks[letter][layer] for letter, layer in places])
        return np.hstack([ranks, [[float(letter == other) for other in MEASURED_LETTERS] for letter, _ in places]])


def _normal_scores(values: Sequence[float]) -> Floats:
    """Return normal quantiles of the ranks, ties at their mean."""
    scores: Floats = norm.ppf((rankdata(values) - 0.5) / len(values))
    return scores


def _covariance(first: Sequence[Place], second: Sequence[Place]) -> Floats:
    """Covariance ``[first, second]`` of what ranks leave unexplained."""
    related = np.array([[1.0 if a == b else RELATED[frozenset((a, b))] for b, _ in second] for a, _ in first])
    distance = np.array([[float(i - j) for _, j in second] for _, i in first])
    shape = SMOOTH * np.exp(-0.5 * (distance / REACH) ** 2) + (1 - SMOOTH) * (distance == 0)
    covariance: Floats = REST_SPREAD**2 * related * shape
    return covariance
