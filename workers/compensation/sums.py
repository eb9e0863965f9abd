"""Solve the least-squares problem of one gap from sums over tokens, which add up over batches and shards.

With M [tokens, hidden] what the layer before the gap adds, X the state it leaves, H the dense model's state behind the
gap and W the tokens' weights, the map T = I + D minimises |W^1/2 (X + M D - H)|^2 + ridge |D|^2: the pull is towards
the identity, the plain skip. Only [hidden, hidden] sums are kept, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recipe import CompensationError


@dataclass(frozen=True)
class GapSums:
    """Sums over tokens, all float64: with R = H - X what the plain skip gets wrong, and w the weights.

    The sum of n products in float64 is off by at most n 2^-53 of the sum of their sizes (Higham 2002, section 3.1),
    whatever the order; shards are added in their order, so equal shards give equal bits.
    """

    gram: Tensor
    """M^T W M ``[hidden, hidden]``."""
    cross: Tensor
    """M^T W R ``[hidden, hidden]``."""
    residual_energy: Tensor
    """Sum of w |R|^2, a scalar."""
    target_energy: Tensor
    """Sum of w |H|^2, a scalar."""
    tokens: int

    @classmethod
    def of(
        cls,
        output: Tensor,
        residual: Tensor,
        target: Tensor,
        weights: Tensor,
        *,
        products: torch.dtype = torch.float64,
    ) -> GapSums:
        """Return the sums over one batch's tokens: M, R and H ``[tokens, hidden]`` of any dtype, weights ``[tokens]``.

        ``products`` in float32 halve the time of a batch's matrix products; batches are added in float64 all the same.
        """
        m, r, w = output.double(), residual.double(), weights.double()[:, None]
        weighted = m * w
        factor = weighted.to(products).T
        return cls(
            gram=(factor @ m.to(products)).double(),
            cross=(factor @ r.to(products)).double(),
            residual_energy=(r.square() * w).sum(),
            target_energy=(target.double().square() * w).sum(),
            tokens=len(m),
        )

    @classmethod
    def merge(cls, parts: Sequence[GapSums]) -> GapSums:
        """Add parts up in their order. Raises ValueError when there are none."""
        if not parts:
            raise ValueError("there is nothing to merge: give at least one part")
        total = parts[0]
        for part in parts[1:]:
            total = cls(
                gram=total.gram + part.gram,
                cross=total.cross + part.cross,
                residual_energy=total.residual_energy + part.residual_energy,
                target_energy=total.target_energy + part.target_energy,
                tokens=total.tokens + part.tokens,
            )
        return total

    @property
    def plain_share(self) -> float:
        """The share of H's energy that the plain skip leaves unexplained."""
        return float(self.residual_energy / self.target_energy)


@dataclass(frozen=True)
class Solution:
    """The best map of one gap: T - I ``[hidden, hidden]`` in float64."""

    change: Tensor
    unexplained: float
    """The share of H's energy that the map leaves unexplained on the tokens it was fitted on."""


def solve(sums: GapSums, *, ridge: float) -> Solution:
    """Solve one gap by Cholesky in float64. ``ridge`` is relative to the mean diagonal entry of M^T W M.

    Raises :class:`CompensationError` when the states hold NaN or infinities, or the layer adds nothing.
    """
    gram, cross = sums.gram, sums.cross
    pull = ridge * gram.diagonal().mean()
    regular = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(regular)
    if int(info) or not bool(torch.isfinite(factor).all()) or not bool(torch.isfinite(cross).all()):
        raise CompensationError("a map cannot be fitted: the calibration states are zero, infinite or not numbers")
    change = torch.cholesky_solve(cross, factor)
    left = sums.residual_energy - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
    return Solution(change, max(0.0, float(left / sums.target_energy)))
