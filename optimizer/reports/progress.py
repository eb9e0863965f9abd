"""Measure the progress of a search: the share of the useful region that its plans cover, after each plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.reports.data import JobReport, TrialSummary
from optimizer.search.pareto import Point, front_indices, hypervolume

LOSS_WITHOUT_LIMIT = 0.1
"""Height of the region for a job that sets no limit to the loss, or a limit of 0: ten points."""


@dataclass(frozen=True)
class Step:
    """State of the search after ``plans`` plans: covered share of the region in [0, 1], and the plan that raised it."""

    plans: int
    covered: float
    plan: str


def reference(report: JobReport) -> Point:
    """Return the corner of the region: the dense model's time (ratio 1) and the largest loss that the job allows."""
    return 1.0, report.spec.allowed_loss or LOSS_WITHOUT_LIMIT


def steps(trials: Sequence[TrialSummary], corner: Point) -> tuple[Step, ...]:
    """Return the plans that raised the hypervolume, in the order of the search, and its state at the end.

    The hypervolume is that of predicted latency ratio and accuracy loss on the whole search split, within the region
    below ``corner``, as a share of the region; a gain over dense counts as no loss.
    """
    found: list[Step] = []
    front: list[Point] = []
    area = corner[0] * corner[1]
    for each in trials:
        if not each.complete or each.difference is None or each.predicted_speedup is None:
            continue
        point = (1.0 / each.predicted_speedup, max(0.0, -each.difference))
        if point[0] >= corner[0] or point[1] >= corner[1] or any(_covers(other, point) for other in front):
            continue
        points = [*front, point]
        front = [points[index] for index in front_indices(points)]
        found.append(Step(each.order, hypervolume(front, corner) / area, each.plan))
    if found and found[-1].plans < len(trials):
        found.append(Step(len(trials), found[-1].covered, found[-1].plan))
    return tuple(found)


def _covers(first: Point, second: Point) -> bool:
    return first[0] <= second[0] and first[1] <= second[1]
