"""Mixed-precision optimisation shared by all training: weights with float32 masters and an average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, a constant rate, and a linear decay to zero over the last `decay` of `total` steps.

    Until the decay begins, the rate does not depend on `total`: a run can be made longer before that point and still be
    the run that would have been started with that length. See Haegele et al. 2024, arXiv:2405.18392.
    """

    peak: float
    warmup: int
    total: int
    decay: float

    def rate(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0."""
        left = (self.total - step) / max(1.0, self.decay * self.total)
        return self.peak * max(0.0, min(1.0, (step + 1) / self.warmup, left))


class Optimiser:
    """AdamW on float32 master weights of modules that compute in ``dtype``, with an exponential moving average.

    The constructor converts the module to ``dtype``. `averaged` weights start at the first step, warmed up so that an
    early average is not dominated by the random initialisation. `slow` gives weights whose name starts with a key that
    fraction of the learning rate.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        *,
        slow: Mapping[str, float] | None = None,
        weight_decay: float = 0.05,
        average_decay: float = 0.998,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.schedule = schedule
        self.step_number = 0
        self._average_decay = average_decay
        self._names = [name for name, weight in module.named_parameters() if weight.requires_grad]
        weights = dict(module.named_parameters())
        self._masters = [weights[name].detach().float().clone() for name in self._names]
        module.to(dtype)
        self._weights = [dict(module.named_parameters())[name] for name in self._names]
        self._averages = [master.clone() for master in self._masters]
        groups: list[dict[str, Any]] = []
        for name, master in zip(self._names, self._masters, strict=True):
            factor = next((slower for prefix, slower in (slow or {}).items() if name.startswith(prefix)), 1.0)
            decay = weight_decay if master.ndim > 1 else 0.0
            groups.append({"params": [master], "weight_decay": decay, "factor": factor})
        self._adam = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.98), eps=1e-8, fused=True)

    def step(self) -> float:
        """Apply the gradients found on the bfloat16 weights; returns the gradient norm before clipping to 1."""
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = float(nn.utils.clip_grad_norm_(self._masters, 1.0))
        for group in self._adam.param_groups:
            group["lr"] = self.schedule.rate(self.step_number) * group["factor"]
        self._adam.step()
        self.step_number += 1
        decay = min(self._average_decay, self.step_number / (self.step_number + 10.0))
        with torch.no_grad():
            for master, weight, average in zip(self._masters, self._weights, self._averages, strict=True):
                weight.copy_(master)
                average.lerp_(master, 1.0 - decay)
        return norm

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged float32 weights by parameter name."""
        return dict(zip(self._names, self._averages, strict=True))

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {
            "step": self.step_number,
            "masters": self._masters,
            "averages": self._averages,
            "adam": self._adam.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step_number = state["step"]
        with torch.no_grad():
            for mine, saved in zip(self._masters, state["masters"], strict=True):
                mine.copy_(saved)
            for mine, saved in zip(self._averages, state["averages"], strict=True):
                mine.copy_(saved)
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.copy_(master)
        self._adam.load_state_dict(state["adam"])


def save_state(optimiser: Optimiser, file: Path) -> None:
    """Write the state beside its place first, so that an interruption leaves the earlier one whole."""
    unfinished = file.with_suffix(".unfinished")
    torch.save(optimiser.state(), unfinished)
    unfinished.replace(file)
