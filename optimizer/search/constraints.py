"""The job's constraints as numbers, each met when at most 0; Optuna gets them by ``trial.set_constraint``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimizer.job.sections import ConstraintSpec
from optimizer.search.goals import Goals, is_within
from optimizer.search.space import touched
from optimizer.search.trial import OPTIMISM, Trial
from workers.runtime import SkipPlan


@dataclass(frozen=True)
class Limits:
    """A job's constraints with what is needed to predict a plan's side of them before it is evaluated."""

    spec: ConstraintSpec
    dense_latency_seconds: float | None = None
    """Predicted latency is the ratio times this; None where no profile is at hand."""
    kv_cache_bytes: Callable[[SkipPlan], float] | None = None
    goals: Goals | None = None
    """What is judged in the place of accuracy on one task, each with its own limit."""

    def known(self, plan: SkipPlan, ratio: float) -> dict[str, float]:
        """Return the constraints that need no evaluation, by name."""
        values: dict[str, float] = {}
        if self.spec.min_speedup is not None:
            values["min_speedup"] = ratio * self.spec.min_speedup - 1.0
        if self.spec.max_latency_ms is not None and self.dense_latency_seconds is not None:
            values["max_latency_ms"] = 1000.0 * ratio * self.dense_latency_seconds / self.spec.max_latency_ms - 1.0
        if self.spec.max_kv_cache_bytes is not None and self.kv_cache_bytes is not None:
            values["max_kv_cache_bytes"] = self.kv_cache_bytes(plan) / self.spec.max_kv_cache_bytes - 1.0
        if self.spec.max_layers_touched is not None:
            values["max_layers_touched"] = float(touched(plan) - self.spec.max_layers_touched)
        return values

    def values(self, trial: Trial) -> dict[str, float]:
        """All constraints, by name, as the search's samples show them."""
        values = self.known(SkipPlan.parse(trial.plan), trial.latency_ratio)
        if self.goals is not None:
            for each in trial.goals:
                if each.limit is not None:
                    values[f"loss on {each.name}"] = each.loss - each.limit
            return values
        if self.spec.max_accuracy_drop is not None:
            values["max_accuracy_drop"] = -trial.difference - self.spec.max_accuracy_drop
        if self.spec.min_accuracy is not None:
            values["min_accuracy"] = self.spec.min_accuracy - trial.accuracy
        return values

    def feasible(self, plan: SkipPlan, ratio: float) -> bool:
        """Whether a plan meets every constraint that needs no evaluation."""
        return all(value <= 0.0 for value in self.known(plan, ratio).values())

    def missed(self, name: str, least: float) -> str:
        """Say that no plan meets a constraint; ``least`` is the smallest value that any plan reaches."""
        asked = getattr(self.spec, name)
        if name == "min_speedup":
            return f"no plan can meet min_speedup {asked:g}: the fastest is predicted to run {asked / (1 + least):.2f}x"
        best = asked * (1 + least)
        if name == "max_latency_ms":
            return f"no plan can meet max_latency_ms {asked:g}: the fastest is predicted to take {best:.4g} ms"
        return f"no plan can meet {name} {asked:g}: the smallest possible is {best:.0f}"

    def least_difference(self, dense_accuracy: float) -> float:
        """Return the least difference to dense that the constraints on accuracy allow; -1 where there is none."""
        if self.goals is not None:
            return -self.goals.allowed
        limits = [-1.0]
        if self.spec.max_accuracy_drop is not None:
            limits.append(-self.spec.max_accuracy_drop)
        if self.spec.min_accuracy is not None:
            limits.append(self.spec.min_accuracy - dense_accuracy)
        return max(limits)

    def keeps(self, trial: Trial, dense_accuracy: float, *, optimistic: bool) -> bool:
        """Whether a trial's losses are within their limits: as seen, or as far as the samples leave it plausible."""
        if self.goals is not None:
            return is_within(trial, optimistic=optimistic)
        difference = trial.optimistic_difference if optimistic else trial.difference
        return difference >= self.least_difference(dense_accuracy)

    def promising(self, trial: Trial, front: Sequence[Trial], dense_accuracy: float) -> bool:
        """Whether a candidate could meet the constraints and be on the front once more samples were seen.

        Both are judged from the optimistic end of its difference's interval: a plan is given up only where the
        samples speak against it. A drafter's time per token is judged in the same way.
        """
        if not self.keeps(trial, dense_accuracy, optimistic=True):
            return False
        if not self.feasible(SkipPlan.parse(trial.plan), trial.latency_ratio):
            return False
        if (own := trial.drafter) is not None:
            others = [other.drafter for other in front if other.drafter is not None]
            return not any(
                other.memory <= own.memory and other.pessimistic_time <= own.optimistic_time for other in others
            )
        return not any(
            other.latency_ratio <= trial.latency_ratio
            and other.difference - OPTIMISM * other.difference_error > trial.optimistic_difference
            for other in front
        )
