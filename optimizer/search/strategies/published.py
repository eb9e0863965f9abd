"""The plans of the published methods that need nothing but measurements, as seeds for the other strategies."""

from __future__ import annotations

from collections.abc import Callable

from optimizer.errors import UsageFault
from optimizer.search.problem import PlanList, Problem
from optimizer.search.space import Candidate
from optimizer.search.strategies.angular import angular
from optimizer.search.strategies.replaceme import replaceme
from optimizer.search.strategies.shortgpt import shortgpt
from optimizer.search.strategies.shortv import shortv
from optimizer.search.strategies.vtw import vtw
from workers.errors import MeasurementError

ONE_SHOT: tuple[Callable[[Problem], PlanList], ...] = (shortgpt, angular, shortv, vtw, replaceme)

KINDS = {"shortgpt": ("distance",), "angular": ("angular",), "replaceme": ("angular",), "shortv": ("causal",)}
"""Kinds of measurement that a strategy reads beside the job's criterion."""


def published_ladders(problem: Problem) -> tuple[tuple[Candidate, ...], ...]:
    """The plans of every published method that the job's actions and measurements allow, method by method."""
    found = []
    for method in ONE_SHOT:
        try:
            found.append(method(problem).plans)
        except (UsageFault, MeasurementError):
            continue  # the job lacks the action, or its criterion did not need the measurement
    return tuple(found)
