"""Judge plans by several losses at once: on each of a job's tasks, on tasks beside them, on general text.

Every loss has a limit of its own, in its own unit: accuracy lost, as a share, or nats a token of divergence. What the
search minimises beside latency is one number, the loss that is the largest share of its limit or the weighted mean of
the losses of the job's tasks. Whether a plan is within the limits is asked of each loss by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from optimizer.search.space import Candidate
from optimizer.search.trial import (
    OPTIMISM,
    GoalFigures,
    Scores,
    Trial,
    answered_by_both,
    mean_and_error,
    paired_difference,
)

LEAST_LIMIT = 1e-3
"""Limit that a loss is divided by where its own is smaller, or where dense itself misses the least accuracy."""
USUAL_LIMIT = 0.01
"""Limit that stands for one unit of loss where no task has any."""


@dataclass(frozen=True)
class Goal:
    """Limit the loss on one task, or on text, and say how much it counts."""

    name: str
    size: int
    """Samples (of text, passages) of the search split."""
    max_loss: float | None
    """As a share of samples, of text in nats a token; None where there is no limit."""
    min_accuracy: float | None = None
    weight: float = 1.0
    """In the mean; 0 for what is beside the job's tasks."""
    is_text: bool = False

    @property
    def has_limit(self) -> bool:
        """Whether anything bounds the loss."""
        return self.max_loss is not None or self.min_accuracy is not None

    def figures(self, scores: Scores, dense: Scores) -> GoalFigures | None:
        """Compute the loss on the samples that plan and dense both answered; None where there are none."""
        n = len(scores.values)
        its_dense, own = answered_by_both(dense.values[:n], scores.values)
        if not own:
            return None
        accuracy, dense_accuracy = math.fsum(own) / len(own), math.fsum(its_dense) / len(own)
        if self.is_text:
            loss, error = mean_and_error(scores.kl)
            if loss is None or error is None:
                return None
            error = max(error, loss / len(own))  # few passages tell little
        else:
            difference, error = paired_difference(its_dense, own)
            loss = -difference
        return GoalFigures(self.name, n, accuracy, loss, error, self.limit(dense_accuracy), self.weight, self.is_text)

    def limit(self, dense_accuracy: float) -> float | None:
        """Return the most that may be lost, given the accuracy of the dense model on the same samples."""
        limits = [] if self.max_loss is None else [self.max_loss]
        if self.min_accuracy is not None:
            limits.append(dense_accuracy - self.min_accuracy)
        return min(limits) if limits else None


@dataclass(frozen=True)
class Goals:
    """All that a job's plans are judged by."""

    each: tuple[Goal, ...]
    objective: Literal["worst", "mean"] = "worst"

    @property
    def size(self) -> int:
        """Samples of all search splits together."""
        return sum(goal.size for goal in self.each)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """To which goal each sample of the common order belongs; its beginnings hold all of them in proportion."""
        places = [
            ((number + 0.5) / goal.size, which) for which, goal in enumerate(self.each) for number in range(goal.size)
        ]
        return tuple(which for _, which in sorted(places))

    def prefixes(self, n_samples: int) -> dict[str, int]:
        """Return how many samples of each goal the first ``n_samples`` of the common order hold."""
        counted = [0] * len(self.each)
        for which in self._order[:n_samples]:
            counted[which] += 1
        return {goal.name: count for goal, count in zip(self.each, counted, strict=True)}

    @property
    def unit(self) -> float:
        """The least limit on accuracy that any task has: a loss of so much is one that reaches its limit."""
        limits = [goal.max_loss for goal in self.each if goal.max_loss is not None and not goal.is_text]
        return max(LEAST_LIMIT, min(limits, default=USUAL_LIMIT))

    @property
    def allowed(self) -> float:
        """The largest objective at which a plan may still be within all limits."""
        if self.objective == "worst" and any(goal.has_limit for goal in self.each):
            return self.unit
        own = [goal for goal in self.each if goal.weight]
        limits = [1.0 if goal.max_loss is None else goal.max_loss for goal in own]
        return _mean(limits, [goal.weight for goal in own])

    def trial_of(self, candidate: Candidate, scores: Scores, dense: Scores, ratio: float, n_samples: int) -> Trial:
        """Compute a candidate's figures from its scores and dense's; ``n_samples`` is the size of all search splits."""
        by_name = {goal.name: goal for goal in self.each}
        found = tuple(
            figures
            for name, own in scores.by_goal.items()
            if own.values and (figures := by_name[name].figures(own, dense.by_goal[name])) is not None
        )
        loss, error = self._objective(found) if found else (0.0, 1.0)
        own = [each for each in found if each.weight] or list(found)
        kl, kl_error = mean_and_error(_own_divergences(by_name, scores.by_goal))
        n = scores.n_samples
        return Trial(
            plan=candidate.plan.text,
            compensation=candidate.compensation,
            n_samples=n,
            accuracy=_mean([each.accuracy for each in own], [each.weight or 1.0 for each in own]) if own else 0.0,
            difference=-loss,
            difference_error=0.0 if candidate.is_dense else error,
            latency_ratio=ratio,
            complete=n == n_samples,
            kl=kl,
            kl_error=kl_error,
            goals=found,
        )

    def _objective(self, found: Sequence[GoalFigures]) -> tuple[float, float]:
        """Return what is minimised, and its standard error."""
        limited = [each for each in found if each.limit is not None]
        if self.objective == "worst" and limited:
            worst = max(limited, key=lambda each: each.loss / _divisor(each))
            scale = self.unit / _divisor(worst)
            return worst.loss * scale, worst.error * scale
        own = [each for each in found if each.weight] or list(found)
        weights = [each.weight or 1.0 for each in own]
        squares = math.fsum((weight * each.error) ** 2 for weight, each in zip(weights, own, strict=True))
        return _mean([each.loss for each in own], weights), math.sqrt(squares) / math.fsum(weights)


def is_within(trial: Trial, *, optimistic: bool) -> bool:
    """Tell whether every loss of a trial is within its limit, as seen or as far as the samples leave it plausible."""
    return all(
        each.limit is None or each.loss - (OPTIMISM * each.error if optimistic else 0.0) <= each.limit
        for each in trial.goals
    )


def _divisor(each: GoalFigures) -> float:
    return max(LEAST_LIMIT, each.limit or 0.0)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
    return total / math.fsum(weights)


def _own_divergences(goals: Mapping[str, Goal], by_goal: Mapping[str, Scores]) -> list[float] | None:
    """Return the divergences on the samples of the job's tasks; None where they were not measured on all of them."""
    own = [scores.kl for name, scores in by_goal.items() if goals[name].weight and scores.values]
    return None if any(kl is None for kl in own) else [value for kl in own for value in kl or ()]
