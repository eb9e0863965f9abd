"""Fit a guard in closed form: a shrunken Gaussian of the calibration prompts, a threshold by conformal calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import MeasurementError

from .needs import needed_prompts, too_few

LEAST_SCALE = 1e-3
"""Smallest standard deviation of a feature, relative to the root mean square of its kind of tokens: prompts that all
share a word have features that do not vary."""
LEAST_VARIANCE = 1e-3
"""Smallest eigenvalue of the covariance of standardised features."""


@dataclass(frozen=True)
class Gaussian:
    """A mean, standard deviations, and the eigenvectors and eigenvalues of the shrunken covariance, float32.

    The eigenvalue is ``floor`` across all directions that ``basis`` ``[features, rank]`` leaves out.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    variances: Tensor
    floor: float


def fit_gaussian(features: Tensor) -> Gaussian:
    """Fit ``[prompts, features]``, whose halves are of two kinds of tokens, standardised feature by feature.

    The covariance S of the standardised features is shrunk towards the multiple of the identity of the same trace by
    the factor of Ledoit and Wolf (2004, A well-conditioned estimator for large-dimensional covariance matrices).

    Raises MeasurementError for less than two prompts, or features that are no numbers.
    """
    count = len(features)
    if count < 2 or not bool(torch.isfinite(features).all()):
        raise MeasurementError("a guard needs two calibration prompts at least, and states without NaN or infinities")
    x = features.double()
    mean = x.mean(0)
    halves = x.reshape(count, 2, -1).square().mean((0, 2), keepdim=True).sqrt()
    least = (LEAST_SCALE * halves).expand(1, 2, x.shape[1] // 2).reshape(-1).clamp(min=1e-12)
    scale = torch.maximum(x.std(0, correction=0), least)
    standard = (x - mean) / scale
    _, singular, vectors = torch.linalg.svd(standard, full_matrices=False)
    own = singular.square() / count
    average = own.sum() / x.shape[1]
    norm = own.square().sum()
    distance = norm - x.shape[1] * average**2  # |S - average I|^2
    error = standard.square().sum(1).square().sum() / count**2 - norm / count  # of S as an estimate, by its samples
    shrinkage = float((error / distance).clamp(0.0, 1.0)) if float(distance) > 0 else 1.0
    floor = max(shrinkage * float(average), LEAST_VARIANCE)
    rank = int((own > 1e-9 * own[:1].clamp(min=1e-9)).sum())
    return Gaussian(
        mean=mean.float(),
        scale=scale.float(),
        basis=vectors[:rank].T.float().contiguous(),
        variances=((1 - shrinkage) * own[:rank] + floor).float(),
        floor=floor,
    )


def conformal_threshold(scores: Tensor, false_alarms: float) -> float:
    """Return the score that a further prompt of the same kind exceeds with probability ``false_alarms`` at most.

    The ceil((n + 1)(1 - false_alarms))-th smallest of n ``scores`` that the distribution was not fitted on (Vovk et
    al. 2005; Lei et al. 2018), over the draw of all n + 1. Raises MeasurementError where n is too small.
    """
    if len(scores) < needed_prompts(false_alarms):
        raise MeasurementError(too_few(len(scores), false_alarms))
    rank = math.ceil((len(scores) + 1) * (1 - false_alarms) - 1e-9)
    return float(scores.double().sort().values[rank - 1])
