"""How much a token counts in a fit. Massive activations would drown all other tokens if squares were summed plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .calibration import Calibration, CalibrationBatch
from .recipe import Weighting

Weigh = Callable[[int, CalibrationBatch, Tensor], Tensor]
"""From the last layer of a gap, a batch and its targets ``[kept, hidden]`` to weights ``[kept]``, float64."""
Gains = Mapping[int, tuple[float, float]]
"""By layer, how much an error of unit size on vision tokens, and on text tokens, changes the answer (KL, nats)."""


def weigher(weighting: Weighting, calibration: Calibration, gains: Callable[[int], tuple[float, float]]) -> Weigh:
    """The weights of a recipe. ``gains`` is asked for weighting ``gain`` only."""
    if weighting == "uniform":
        return lambda layer, batch, target: torch.ones(len(target), dtype=torch.float64, device=target.device)
    if weighting == "rms":
        return lambda layer, batch, target: inverse_mean_square(target)
    if weighting == "groups":
        factors = _equal_groups(calibration)
        return lambda layer, batch, target: inverse_mean_square(target) * _by_group(batch, factors)
    if weighting == "answers":
        parts = _equal_parts(calibration)
        return lambda layer, batch, target: inverse_mean_square(target) * _by_part(batch, parts)
    return lambda layer, batch, target: inverse_mean_square(target) * _by_group(batch, gains(layer))


def inverse_mean_square(target: Tensor) -> Tensor:
    """1 / mean square of every state, ``[kept]``: errors count relative to the root mean square of the target."""
    return 1.0 / target.double().square().mean(-1).clamp(min=1e-24)


def _by_group(batch: CalibrationBatch, factors: tuple[float, float]) -> Tensor:
    vision = batch.kept_vision
    return torch.where(vision, factors[0], factors[1]).double()


def _equal_groups(calibration: Calibration) -> tuple[float, float]:
    """Factors that make vision tokens and text tokens weigh the same in total."""
    vision = sum(int(batch.kept_vision.sum()) for batch in calibration.batches)
    text = calibration.kept - vision
    return (1.0 if not vision else calibration.kept / (2 * vision), 1.0 if not text else calibration.kept / (2 * text))


def _by_part(batch: CalibrationBatch, factors: tuple[float, float, float]) -> Tensor:
    return torch.where(batch.kept_answers, factors[2], _by_group(batch, factors[:2])).double()


def _equal_parts(calibration: Calibration) -> tuple[float, float, float]:
    """Factors that make vision tokens, the prompts' other tokens, and those that answer weigh the same in total."""
    answers = sum(int(batch.kept_answers.sum()) for batch in calibration.batches)
    vision = sum(int((batch.kept_vision & ~batch.kept_answers).sum()) for batch in calibration.batches)
    counts = (vision, calibration.kept - vision - answers, answers)
    vision_factor, text_factor, answer_factor = (calibration.kept / (3 * count) if count else 1.0 for count in counts)
    return vision_factor, text_factor, answer_factor
