"""A Gaussian process over plans: a linear mean in a few basis terms, single terms, pair terms, local pair terms.

The pair terms are never written out: between two plans with ``m`` equal actions there are m (m - 1) / 2 equal pairs,
so a row of the kernel costs one product of 0/1 rows. Draws from the posterior are functions that can be evaluated at
any plan (pathwise conditioning, Wilson et al. 2020, arXiv 2002.09309).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from optimizer.sampling.encoding import Encoding

Floats = NDArray[np.float64]

JITTER = 1e-8


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the terms' weights and of what no term explains."""

    basis: float = 1.0
    single: float = 0.3
    pair: float = 0.05
    local: float = 0.1
    misfit: float = 0.1


GRID = (0.4, 2.5)
"""Factors by which a scale is tried smaller and larger."""


class Kernel:
    """Covariance between plans given as (basis, rows)."""

    def __init__(self, encoding: Encoding, scales: Scales) -> None:
        self.encoding, self.scales = encoding, scales

    def __call__(self, first: Design, second: Design) -> Floats:
        """[first, second]."""
        return self.combine(self.parts(first, second))

    def parts(self, first: Design, second: Design) -> tuple[Floats, Floats, Floats, Floats]:
        """The four terms at unit scale; reused while the scales are fitted."""
        equal = first.rows @ second.rows.T
        local = np.zeros_like(equal)
        for window in self.encoding.windows:
            within = first.rows[:, window] @ second.rows[:, window].T
            local += within * (within - 1.0)
        return first.basis @ second.basis.T, equal, equal * (equal - 1.0) / 2, local / 2

    def combine(self, parts: tuple[Floats, Floats, Floats, Floats]) -> Floats:
        """Weigh unit-scale terms."""
        s = self.scales
        weights = (s.basis**2, s.single**2, s.pair**2, s.local**2)
        total = weights[0] * parts[0]
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total += weight * part
        return total


@dataclass(frozen=True)
class Design:
    """Plans as the surrogate sees them: basis terms ``[plans, terms]`` and 0/1 rows ``[plans, columns]``."""

    basis: Floats
    rows: Floats

    def __len__(self) -> int:
        return len(self.rows)


class Surrogate:
    """Posterior over a function of plans, given noisy values of it."""

    def __init__(self, encoding: Encoding, scales: Scales, design: Design, values: Floats, noise: Floats) -> None:
        """``values`` and ``noise`` (variances) are [plans]."""
        self._kernel = Kernel(encoding, scales)
        self._design, self._values = design, values
        self._noise = noise + scales.misfit**2
        self._parts = self._kernel.parts(design, design)
        self._factor = self._factorise(self._kernel)
        self._weights = cho_solve(self._factor, values)

    def _factorise(self, kernel: Kernel) -> tuple[Floats, bool]:
        covariance = kernel.combine(self._parts)
        covariance[np.diag_indices_from(covariance)] += self._noise + JITTER
        factor: tuple[Floats, bool] = cho_factor(covariance, lower=True, overwrite_a=True, check_finite=False)
        return factor

    def evidence(self) -> float:
        """Log marginal likelihood, constants left out."""
        fit = float(self._values @ self._weights)
        return -0.5 * fit - float(np.log(np.diag(self._factor[0])).sum())

    def mean(self, design: Design) -> Floats:
        """Posterior mean; [plans]."""
        mean: Floats = self._kernel(design, self._design) @ self._weights
        return mean

    def draws(self, count: int, damping: Floats, random: np.random.Generator) -> Callable[[Design], Floats]:
        """Functions drawn from the posterior, their distance from its mean multiplied by ``damping`` [draws].

        The function returned maps plans to [draws + 1, plans]; row 0 is the mean.
        """
        prior = Prior(self._kernel, count, random)
        wanted = prior(self._design) + np.sqrt(self._noise) * random.standard_normal((count, len(self._design)))
        corrections = cho_solve(self._factor, wanted.T, check_finite=False)

        def evaluate(design: Design) -> Floats:
            covariance = self._kernel(design, self._design)
            mean = covariance @ self._weights
            deviations = prior(design) - (covariance @ corrections).T
            return np.vstack([mean, mean + damping[:, None] * deviations])

        return evaluate


class Prior:
    """Functions drawn from the kernel's prior, as explicit weights of all terms."""

    def __init__(self, kernel: Kernel, count: int, random: np.random.Generator) -> None:
        s, columns = kernel.scales, len(kernel.encoding.columns)
        self._count, self._single = count, s.single * random.standard_normal((count, columns))
        self._basis_scale, self._random = s.basis, random
        self._basis: Floats | None = None
        spread = np.sqrt(s.pair**2 + s.local**2 * kernel.encoding.shared_windows)
        upper = np.triu(spread * random.standard_normal((count, columns, columns)), k=1)
        self._pairs = upper + upper.transpose(0, 2, 1)

    def __call__(self, design: Design) -> Floats:
        """[draws, plans]."""
        if self._basis is None:
            self._basis = self._basis_scale * self._random.standard_normal((self._count, design.basis.shape[1]))
        values = self._basis @ design.basis.T + self._single @ design.rows.T
        for number, pairs in enumerate(self._pairs):
            values[number] += 0.5 * np.einsum("ij,ij->i", design.rows @ pairs, design.rows)
        return values


def fit_scales(
    encoding: Encoding, start: Scales, design: Design, values: Floats, noise: Floats, names: Sequence[str]
) -> Scales:
    """Scales of larger evidence, one coordinate after another, each once smaller and once larger."""
    best, best_evidence = start, Surrogate(encoding, start, design, values, noise).evidence()
    for name in names:
        for factor in GRID:
            scales = replace(best, **{name: min(5.0, max(1e-3, getattr(best, name) * factor))})
            evidence = Surrogate(encoding, scales, design, values, noise).evidence()
            if evidence > best_evidence:
                best, best_evidence = scales, evidence
                break
    return best
