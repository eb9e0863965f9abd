"""Model the loss of accuracy of any plan from evaluations (loss, and KL to dense where known), and its value.

Accuracy counts right and wrong answers and is coarse; the KL divergence to the dense model moves with every logit. So
the surrogate learns the square root of the KL, a rising curve (isotonic regression) turns it into a loss, and a
second surrogate learns what that curve leaves over. Without KL the surrogate learns the loss itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from optimizer.search.pareto import Point, front_indices
from optimizer.search.surrogate.encoding import Encoding
from optimizer.search.surrogate.model import Design, Scales, Surrogate, Terms, fit_scales

Floats = NDArray[np.float64]
Draws = Callable[[Design], Floats]

START = Scales(basis=1.0, single=0.5, kin=0.5, pair=0.05, local=0.1, misfit=0.1)
LEFT_OVER = Scales(basis=0.0, single=0.3, kin=0.1, pair=0.1, local=0.1, misfit=0.1)
FITTED = ("basis", "single", "kin", "pair", "local", "misfit")


@dataclass(frozen=True)
class Observations:
    """Figures of evaluated plans, each [plans]; ``kl`` is NaN throughout where it is not known."""

    design: Design
    loss: Floats
    loss_error: Floats
    kl: Floats
    kl_error: Floats

    @property
    def has_kl(self) -> bool:
        """Whether the KL to dense is known for all of them."""
        return bool(np.isfinite(self.kl).all())


class LossModel:
    """Fit the posterior over the loss of accuracy of any plan."""

    def __init__(self, encoding: Encoding, seen: Observations, scales: Scales = START, rounds: int = 1) -> None:
        """``scales`` are where the fit of the kernel's scales starts, ``rounds`` how often it goes over them."""
        self._curve: tuple[Floats, Floats] | None = None
        target, noise = seen.loss, seen.loss_error**2
        if seen.has_kl:
            target = np.sqrt(np.maximum(seen.kl, 0.0))
            noise = (seen.kl_error / (2 * np.maximum(target, 0.02))) ** 2
        self._centre, self._spread = float(target.mean()), max(1e-6, float(target.std()))
        values, noise = (target - self._centre) / self._spread, noise / self._spread**2
        self._encoding, self._seen = encoding, seen.design
        terms = Terms(encoding, seen.design, seen.design)
        for _ in range(rounds):
            scales = fit_scales(scales, terms, values, noise, FITTED)
        self.scales = scales
        self._main = Surrogate(scales, terms, values, noise)
        self._rest: Surrogate | None = None
        if seen.has_kl:
            order = np.argsort(target, kind="stable")
            weights = 1.0 / (seen.loss_error[order] ** 2 + 1e-6)
            self._curve = (target[order], np.asarray(isotonic_regression(seen.loss[order], weights=weights).x))
            left = seen.loss - np.interp(target, *self._curve)
            self._rest_spread = max(1e-4, float(left.std()))
            self._rest = Surrogate(
                LEFT_OVER, terms, left / self._rest_spread, (seen.loss_error / self._rest_spread) ** 2
            )

    def draws(self, damping: Floats, random: np.random.Generator) -> Draws:
        """Functions from plans to [draws + 1, plans] losses; row 0 holds the mean's.

        What the curve leaves over enters by its mean: draws of it would mostly be draws of the samples' noise.
        """
        main = self._main.draws(damping, self._encoding, self._seen, random)

        def evaluate(design: Design) -> Floats:
            terms = Terms(self._encoding, design, self._seen, single=True)
            values = self._centre + self._spread * main(design, terms)
            if self._curve is not None:
                values = np.interp(values, *self._curve)
            if self._rest is not None:
                values = values + self._rest_spread * self._rest.mean(terms)
            return values

        return evaluate


class Stairs:
    """Front of (latency ratio, loss) as a falling step function: the smallest loss up to a latency ratio."""

    def __init__(self, points: Sequence[Point], reference: Point) -> None:
        inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
        front = [inside[index] for index in front_indices(inside)]
        self.reference = reference
        self._ratios = np.array([point[0] for point in front])
        self._starts = np.array([-np.inf, *self._ratios])
        self._ends = np.array([*self._ratios, reference[0]])
        self._levels = np.array([reference[1], *(point[1] for point in front)])
        self.lowest = float(self._levels[-1])

    def gain(self, ratios: Floats, losses: Floats) -> Floats:
        """Return the hypervolume added by each candidate alone; ``ratios`` [plans], ``losses`` [..., plans]."""
        width = np.clip(self._ends[:, None] - np.maximum(self._starts[:, None], ratios[None]), 0.0, None)
        height = np.clip(self._levels[:, None] - losses[..., None, :], 0.0, None)
        area: Floats = (width * height).sum(axis=-2)
        return area

    def excess(self, ratios: Floats, losses: Floats) -> Floats:
        """Return by how much a candidate's loss is above the front at its ratio (negative where it is below)."""
        step = np.searchsorted(self._ratios, ratios, side="right")
        above: Floats = losses - self._levels[step]
        return above
