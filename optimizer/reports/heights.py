"""Place plans on the axis of losses by what the search of their job minimised (:mod:`optimizer.search.goals`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from optimizer.job.result import Loss, losses
from optimizer.search.goals import LEAST_LIMIT, Goal, Goals
from storage.records.plans import Plan

Objective = Literal["worst", "mean"]


@dataclass(frozen=True)
class Height:
    """A verified plan's place on the axis of losses, with its interval; a loss is negative."""

    value: float
    low: float
    high: float


def is_mean(goals: Goals) -> bool:
    """Tell whether the mean of the losses is minimised, as it also is where nothing has a limit."""
    return goals.objective == "mean" or not any(goal.has_limit for goal in goals.each)


def allowed_loss(goals: Goals) -> float | None:
    """Return the height, as a loss, that a plan within all limits cannot lie below; None where there is no such."""
    if not is_mean(goals):
        return goals.unit
    own = [goal for goal in goals.each if goal.weight]
    return goals.allowed if all(goal.max_loss is not None for goal in own) else None


def height(plan: Plan, objective: Objective = "worst") -> Height:
    """Return a plan's difference to dense; of several losses what the search minimised, held-out.

    That is the loss that is the largest share of its limit, scaled to the least limit of accuracy, or the weighted mean
    of the losses on the job's tasks, whose ends are the means of their intervals' ends (wider than the mean's own).
    """
    found = losses(plan)
    if not found:
        return Height(plan.difference, plan.difference_low, plan.difference_high)
    goals = Goals(tuple(map(_goal, found)), objective)
    if is_mean(goals):
        own = [each for each in found if each.weight]
        total = math.fsum(each.weight for each in own)
        value, high, low = (
            math.fsum(each.weight * getattr(each, name) for each in own) / total
            for name in ("loss", "loss_high", "loss_low")
        )
        return Height(-value, -high, -low)
    limited = [
        (each, max(LEAST_LIMIT, most))
        for each, goal in zip(found, goals.each, strict=True)
        if (most := goal.limit(each.dense_accuracy)) is not None
    ]
    worst, divisor = max(limited, key=lambda pair: pair[0].loss / pair[1])
    scale = goals.unit / divisor
    return Height(-worst.loss * scale, -worst.loss_high * scale, -worst.loss_low * scale)


def _goal(each: Loss) -> Goal:
    return Goal(each.name, each.n_samples, each.max_loss, each.min_accuracy, each.weight, each.is_text)
