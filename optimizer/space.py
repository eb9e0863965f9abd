"""Which plans a job may propose: the actions each layer may take, after the model's and the job's limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from optimizer.errors import UsageFault
from optimizer.job import JobSpec
from workers.messages import WorkerInfo
from workers.runtime import Action, SkipPlan


@dataclass(frozen=True)
class PlanSpace:
    """Letters allowed per layer (``R`` first everywhere) and the most layers that may differ from ``R``."""

    letters: tuple[str, ...]
    max_touched: int

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.letters)

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Layers that have a choice."""
        return tuple(layer for layer, letters in enumerate(self.letters) if len(letters) > 1)

    @property
    def size(self) -> int:
        """Number of plans, the limit on touched layers left aside."""
        return math.prod(len(letters) for letters in self.letters)

    def __contains__(self, plan: SkipPlan) -> bool:
        return (
            len(plan) == self.num_layers
            and all(action.value in letters for action, letters in zip(plan, self.letters, strict=True))
            and touched(plan) <= self.max_touched
            and any(action is not Action.SKIP for action in plan)  # a model without any layer left is no model
        )

    def enumerate(self) -> Iterator[SkipPlan]:
        """Every plan, the last layers varying fastest."""
        for letters in product(*self.letters):
            plan = SkipPlan.parse("".join(letters))
            if plan in self:
                yield plan


def touched(plan: SkipPlan) -> int:
    """Number of layers that do other than run."""
    return sum(action is not Action.RUN for action in plan)


def plan_space(spec: JobSpec, worker: WorkerInfo) -> PlanSpace:
    """The space of a job on a model. Raises UsageFault when a protected layer does not exist or nothing is left."""
    for layer in spec.protect:
        if layer >= worker.num_layers:
            raise UsageFault(f"protect: layer {layer} does not exist, the model has layers 0..{worker.num_layers - 1}")
    letters = tuple(
        "R" if layer in spec.protect else "".join(letter for letter in spec.letters if letter in allowed)
        for layer, allowed in enumerate(worker.allowed_actions)
    )
    if all(own == "R" for own in letters):
        raise UsageFault(f"actions: no layer of the model may take any of {', '.join(spec.actions)}")
    return PlanSpace(letters, spec.constraint.max_layers_touched or worker.num_layers)
