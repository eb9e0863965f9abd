"""The propagation gain of token groups: how much an error on them, behind a layer, changes the answer.

A fit that weighs tokens by it minimises a local model of the answer's KL divergence instead of the states' error: an
error that nothing behind it reads costs nothing. Measured by finite differences on the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workers.models.loading import LoadedModel
from workers.runtime.locate import locate

from .calibration import Calibration

ERROR = 0.1
"""Size of the error put on every token of a group, relative to the state's root mean square."""
SMALLEST_SHARE = 1e-3
"""Least factor of a group, relative to the other's."""


def propagation_gains(loaded: LoadedModel, calibration: Calibration) -> Callable[[int], tuple[float, float]]:
    """By layer, factors for vision and for text tokens, with mean 1 over the kept tokens; each measured once.

    A factor is KL(dense || disturbed) at the last token, in nats, per disturbed token of the first batch.
    """
    known: dict[int, tuple[float, float]] = {}

    def gains(layer: int) -> tuple[float, float]:
        if layer not in known:
            known[layer] = _measure(loaded, calibration, layer)
        return known[layer]

    return gains


def _measure(loaded: LoadedModel, calibration: Calibration, layer: int) -> tuple[float, float]:
    batch = calibration.batches[0]
    real = torch.zeros_like(batch.vision).flatten()
    real[batch.kept] = True
    groups = (batch.vision, real.view(batch.vision.shape) & ~batch.vision)
    dense = _last_log_probabilities(loaded, calibration, layer, None)
    raw = []
    for group in groups:
        count = int(group.sum())
        disturbed = _last_log_probabilities(loaded, calibration, layer, group) if count else dense
        divergence = (dense.exp() * (dense - disturbed)).sum(-1).clamp(min=0).mean()
        raw.append(float(divergence) / max(1, count))
    largest = max(*raw, 1e-30)
    vision, text = (max(value / largest, SMALLEST_SHARE) for value in raw)
    kept = sum(int(each.kept_vision.sum()) for each in calibration.batches)
    mean = (vision * kept + text * (calibration.kept - kept)) / calibration.kept
    return vision / mean, text / mean


def _last_log_probabilities(loaded: LoadedModel, calibration: Calibration, layer: int, group: Tensor | None) -> Tensor:
    """Log-probabilities ``[batch, vocabulary]`` at every sample's last kept token, errors put on ``group``."""
    batch, stack = calibration.batches[0], locate(loaded.model)
    owner: Any = stack.owner
    head: Any = loaded.model.get_output_embeddings()

    def disturb(module: Any, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(layer)).to(state.device)
        size = state.float().square().mean(-1, keepdim=True).sqrt() * ERROR
        assert group is not None
        changed = (state.float() + noise * size * group[..., None]).to(state.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = None if group is None else stack.layers[layer].register_forward_hook(disturb)
    try:
        with torch.inference_mode():
            states: Tensor = owner(*batch.args, **batch.kwargs)[0]
    finally:
        if handle is not None:
            handle.remove()
    last: Tensor = head(
        states[torch.arange(len(states), device=states.device), _last_columns(batch.vision.shape, batch.kept)]
    )
    return last.float().log_softmax(-1)


def _last_columns(shape: torch.Size, kept: Tensor) -> Tensor:
    """The column of every row's last kept token, ``[batch]``."""
    columns = torch.zeros(shape[0], dtype=torch.long, device=kept.device)
    rows, places = kept // shape[1], kept % shape[1]
    return columns.scatter_reduce(0, rows, places, "amax")
