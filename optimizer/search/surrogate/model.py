"""A Gaussian process over plans: a linear mean in a few basis terms, single terms, pair terms, local pair terms.

What an action does to one layer says something of what it does to others, most to its neighbours: beside weights of
their own, single terms have weights that are correlated between layers. The pair terms are never written out: between
two plans with ``m`` equal actions there are m (m - 1) / 2 equal pairs, so a row of the kernel costs one product of 0/1
rows. Draws from the posterior are functions that can be evaluated at any plan (pathwise conditioning, Wilson et al.
2020, arXiv 2002.09309).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from optimizer.search.surrogate.encoding import Encoding

Floats = NDArray[np.float64]

JITTER = 1e-8


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the terms' weights and of what no term explains."""

    basis: float = 1.0
    single: float = 0.3
    kin: float = 0.3
    pair: float = 0.05
    local: float = 0.1
    misfit: float = 0.1


BLOCK = 128
"""Plans whose pair terms are drawn at once, which bounds memory."""
GRID = (0.4, 2.5)
"""Factors by which a scale is tried smaller and larger."""


@dataclass(frozen=True)
class Design:
    """Features of plans: basis terms ``[plans, terms]`` and 0/1 rows ``[plans, columns]``."""

    basis: Floats
    rows: Floats

    def __len__(self) -> int:
        return len(self.rows)


class Terms:
    """Compute the kernel's terms at unit scale between two sets of plans, each [first, second]: five products.

    Single precision serves thousands of candidates; a covariance that is to be factorised needs double.
    """

    def __init__(self, encoding: Encoding, first: Design, second: Design, *, single: bool = False) -> None:
        precision: type[np.floating[Any]] = np.float32 if single else np.float64
        a: NDArray[np.floating[Any]]
        b: NDArray[np.floating[Any]]
        a, b = first.rows.astype(precision), second.rows.astype(precision).T
        self.basis = first.basis @ second.basis.T
        self.single = a @ b
        self.kin = (first.rows @ encoding.kinship).astype(precision) @ b
        # Equal pairs within a window are w (w - 1) / 2 for w equal steps; the sum of all w is one product.
        self.local = -(a * encoding.window_counts.astype(precision)) @ b
        within = np.empty_like(self.local)
        for window in encoding.windows:
            np.matmul(a[:, window], b[window], out=within)
            np.multiply(within, within, out=within)
            self.local += within
        self.local *= 0.5
        self.pair = 0.5 * self.single * (self.single - 1.0)

    def covariance(self, scales: Scales) -> Floats:
        """Return the kernel: the terms weighed by their scales."""
        total = (scales.basis**2) * self.basis
        weights = (scales.single**2, scales.kin**2, scales.pair**2, scales.local**2)
        for weight, term in zip(weights, (self.single, self.kin, self.pair, self.local), strict=True):
            total += weight * term
        return total


Drawn = Callable[[Design, Terms], Floats]


class Surrogate:
    """Posterior over a function of plans, given noisy values of it."""

    def __init__(self, scales: Scales, terms: Terms, values: Floats, noise: Floats) -> None:
        """``values`` and ``noise`` (variances) are [plans]; ``terms`` are between these plans and themselves."""
        self._scales, self._values = scales, values
        self._noise = noise + scales.misfit**2
        covariance = terms.covariance(scales)
        covariance[np.diag_indices_from(covariance)] += self._noise + JITTER
        self._factor: tuple[Floats, bool] = cho_factor(covariance, lower=True, overwrite_a=True, check_finite=False)
        self._weights = cho_solve(self._factor, values)

    def evidence(self) -> float:
        """Log marginal likelihood, constants left out."""
        fit = float(self._values @ self._weights)
        return -0.5 * fit - float(np.log(np.diag(self._factor[0])).sum())

    def mean(self, terms: Terms) -> Floats:
        """Posterior mean at other plans, of which ``terms`` are with the known ones; [other plans]."""
        mean: Floats = terms.covariance(self._scales) @ self._weights
        return mean

    def draws(self, damping: Floats, encoding: Encoding, known: Design, random: np.random.Generator) -> Drawn:
        """Functions drawn from the posterior given the ``known`` plans.

        Their distance from its mean is multiplied by ``damping`` [draws]. What is returned maps other plans, and their
        terms with the known ones, to [draws + 1, other plans]; row 0 is the mean.
        """
        count = len(damping)
        prior = Prior(encoding, self._scales, count, random)
        wanted = prior(known) + np.sqrt(self._noise) * random.standard_normal((count, len(known)))
        corrections = cho_solve(self._factor, wanted.T, check_finite=False)

        def evaluate(design: Design, terms: Terms) -> Floats:
            covariance = terms.covariance(self._scales)
            mean = covariance @ self._weights
            deviations = prior(design) - (covariance @ corrections).T
            return np.vstack([mean, mean + damping[:, None] * deviations])

        return evaluate


class Prior:
    """Functions drawn from the kernel's prior, as explicit weights of all terms."""

    def __init__(self, encoding: Encoding, scales: Scales, count: int, random: np.random.Generator) -> None:
        columns = len(encoding.columns)
        own = scales.single * random.standard_normal((count, columns))
        shared = scales.kin * random.standard_normal((count, columns)) @ encoding.kinship_factor.T
        self._count, self._single = count, own + shared
        self._basis_scale, self._random = scales.basis, random
        self._basis: Floats | None = None
        spread = np.sqrt(scales.pair**2 + scales.local**2 * encoding.shared_windows)
        # [columns, draws x columns], a pair's weight above the diagonal only.
        pairs = np.triu(spread * random.standard_normal((count, columns, columns)), k=1)
        self._pairs = pairs.transpose(1, 0, 2).reshape(columns, -1).astype(np.float32)

    def __call__(self, design: Design) -> Floats:
        """Evaluate the functions at plans; [draws, plans]."""
        if self._basis is None:
            self._basis = self._basis_scale * self._random.standard_normal((self._count, design.basis.shape[1]))
        values: Floats = self._basis @ design.basis.T + self._single @ design.rows.T
        rows = design.rows.astype(np.float32)
        for start in range(0, len(rows), BLOCK):
            some = rows[start : start + BLOCK]
            by_draw = (some @ self._pairs).reshape(len(some), self._count, -1)
            values[:, start : start + BLOCK] += np.matmul(by_draw, some[:, :, None])[:, :, 0].T
        return values


def fit_scales(start: Scales, terms: Terms, values: Floats, noise: Floats, names: Sequence[str]) -> Scales:
    """Scales of larger evidence, one coordinate after another, each once smaller and once larger."""
    best, best_evidence = start, Surrogate(start, terms, values, noise).evidence()
    for name in names:
        for factor in GRID:
            scales = replace(best, **{name: min(5.0, max(1e-3, getattr(best, name) * factor))})
            evidence = Surrogate(scales, terms, values, noise).evidence()
            if evidence > best_evidence:
                best, best_evidence = scales, evidence
                break
    return best
