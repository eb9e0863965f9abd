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
    by_part, general = _equal_shares(calibration)

    def weigh(batch: CalibrationBatch, target: Tensor) -> Tensor:
        if batch.general:
            return inverse_mean_square(target) * general
        vision, text, answer = by_part[batch.part]
        prompt = torch.where(batch.kept_vision, vision, text).double()
        return inverse_mean_square(target) * torch.where(batch.kept_answers, answer, prompt).double()

    return weigh


def inverse_mean_square(target: Tensor) -> Tensor:
    """1 / mean square of every state, ``[kept]``: errors count relative to the root mean square of the target."""
    return 1.0 / target.double().square().mean(-1).clamp(min=1e-24)


def _equal_shares(calibration: Calibration) -> tuple[dict[int, tuple[float, float, float]], float]:
    """Factors of vision tokens, the prompts' other tokens and those that answer, by part; and that of general text.

    The three weigh the same in total, in every part of a joint task, and the text the share that the recipe gives it.
    """
    general = calibration.text_tokens
    task = (1 - calibration.text_share) * calibration.kept if general else calibration.kept
    batches = [batch for batch in calibration.batches if not batch.general]
    parts = sorted({batch.part for batch in batches})
    by_part = {}
    for part in parts:
        own = [batch for batch in batches if batch.part == part]
        answers = sum(int(batch.kept_answers.sum()) for batch in own)
        vision = sum(int((batch.kept_vision & ~batch.kept_answers).sum()) for batch in own)
        counts = (vision, sum(len(batch.kept) for batch in own) - vision - answers, answers)
        of_vision, of_text, of_answers = (task / (3 * len(parts) * count) if count else 1.0 for count in counts)
        by_part[part] = of_vision, of_text, of_answers
    return by_part, calibration.text_share * calibration.kept / general if general else 1.0
