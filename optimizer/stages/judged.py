"""List the tasks and the text that a job judges plans on, each with its limits."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.job.spec import JobSpec
from optimizer.search.goals import Goal
from workers.tasks import Task, load_spec
from workers.tasks.passages import TextTask


@dataclass(frozen=True)
class Judged:
    """A task, or text, with its limits, and how many samples of a split count."""

    task: Task | TextTask
    goal: Goal
    most_samples: int | None = None
    """Of each split, the first ones; None: all."""

    def size(self, split: str) -> int:
        """Return how many samples of a split plans are judged on."""
        whole = len(self.task.split(split))
        return whole if self.most_samples is None else min(whole, self.most_samples)


def judged_of(spec: JobSpec, task: Task) -> dict[str, Judged]:
    """List what plans are judged by, by name, the job's tasks first; ``task`` is what its workers hold."""
    found = {}
    if not task.parts:
        constraint = spec.constraint
        goal = Goal(task.name, len(task.search), constraint.max_accuracy_drop, constraint.min_accuracy)
        found[task.name] = Judged(task, goal)
    by_name = {load_spec(goal.task).name: goal for goal in spec.tasks}
    for part in task.parts:
        limits = by_name[part.name]
        goal = Goal(part.name, len(part.search), limits.max_accuracy_drop, limits.min_accuracy, limits.weight)
        found[part.name] = Judged(part, goal)
    most, collateral = spec.collateral.samples, spec.collateral
    for beside in task.beside:
        if isinstance(beside, TextTask):
            goal = Goal(beside.name, len(beside.search), collateral.max_kl, weight=0.0, is_text=True)
            found[beside.name] = Judged(beside, goal)
        else:
            size = min(most, len(beside.search))
            found[beside.name] = Judged(beside, Goal(beside.name, size, collateral.max_accuracy_drop, weight=0.0), most)
    return found
