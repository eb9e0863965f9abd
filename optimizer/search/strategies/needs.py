"""What a published method needs of a job, said in one line where it is missing."""

from __future__ import annotations

from optimizer.errors import UsageFault
from optimizer.search.problem import Problem
from optimizer.search.surrogate.encoding import SKIP
from workers.errors import MeasurementError
from workers.runtime.plan import Action


def need_action(problem: Problem, strategy: str, letter: str) -> None:
    """Raises UsageFault when no layer may take the action that the method is made of."""
    if not any(letter in own for own in problem.space.letters):
        name = Action.of(letter).label
        raise UsageFault(f"search.strategy: {strategy} needs the action {name} (actions: [{name}])")


def need_plain_skips(problem: Problem, strategy: str) -> None:
    """Raises UsageFault when the job has no skips without compensation."""
    need_action(problem, strategy, SKIP)
    if not any(SKIP in own for own in problem.space.genome_letters):
        raise UsageFault(f"search.strategy: {strategy} skips without compensation (compensation: none or both)")


def need_compensation(problem: Problem, strategy: str) -> None:
    """Raises UsageFault when the job compensates nothing."""
    need_action(problem, strategy, SKIP)
    if problem.space.recipe is None:
        raise UsageFault(f"search.strategy: {strategy} compensates what it skips (compensation: linear or both)")


def need_blocks(problem: Problem, strategy: str) -> None:
    """Raises MeasurementError when the distances of blocks of layers were not measured."""
    if not problem.table.has("angular_distance@1", "last"):
        raise MeasurementError(f"{strategy} needs the angular distances of blocks of layers, which were not measured")
