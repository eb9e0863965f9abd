"""Weigh tokens in a fit. Massive activations would drown all other tokens if squares were summed plainly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .calibration import Calibration, CalibrationBatch
from .recipe import Weighting

Weigh = Callable[[CalibrationBatch, Tensor], Tensor]
"""From a batch and a gap's targets ``[kept, hidden]`` to weights ``[kept]``, float64."""


def weigher(weighting: Weighting, calibration: Calibration) -> Weigh:
    """Return the weights of a recipe over the kept tokens of ``calibration``."""
    if weighting == "uniform":
        return lambda batch, target: torch.ones(len(target), dtype=torch.float64, device=target.device)
    vision, text, answer, general = _equal_parts(calibration)

    def weigh(batch: CalibrationBatch, target: Tensor) -> Tensor:
        if batch.general:
            return inverse_mean_square(target) * general
        prompt = torch.where(batch.kept_vision, vision, text).double()
        return inverse_mean_square(target) * torch.where(batch.kept_answers, answer, prompt).double()

    return weigh


def inverse_mean_square(target: Tensor) -> Tensor:
    """1 / mean square of every state, ``[kept]``: errors count relative to the root mean square of the target."""
    return 1.0 / target.double().square().mean(-1).clamp(min=1e-24)


def _equal_parts(calibration: Calibration) -> tuple[float, float, float, float]:
    """Factors of vision tokens, the prompts' other tokens, those that answer, and general text.

    The first three weigh the same in total, the last the share of all that the recipe gives it.
    """
    answers = sum(int(batch.kept_answers.sum()) for batch in calibration.batches)
    vision = sum(int((batch.kept_vision & ~batch.kept_answers).sum()) for batch in calibration.batches)
    general = calibration.text_tokens
    counts = (vision, calibration.kept - general - vision - answers, answers)
    task = (1 - calibration.text_share) * calibration.kept if general else calibration.kept
    vision_factor, text_factor, answer_factor = (task / (3 * count) if count else 1.0 for count in counts)
    general_factor = calibration.text_share * calibration.kept / general if general else 1.0
    return vision_factor, text_factor, answer_factor, general_factor
