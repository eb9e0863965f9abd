"""Pareto front and hypervolume for two costs that are both minimised."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def dominates(first: Point, second: Point) -> bool:
    """Whether ``first`` is nowhere worse than ``second`` and somewhere better."""
    return first[0] <= second[0] and first[1] <= second[1] and first != second


def front_indices(points: Sequence[Point]) -> list[int]:
    """Return indices of the points that no other point dominates, ordered by the first cost.

    Of several equal points the first is kept, so that the front names each trade-off once.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index], index))
    front: list[int] = []
    best_second = float("inf")
    for index in order:
        if points[index][1] < best_second:
            front.append(index)
            best_second = points[index][1]
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that the points dominate inside the box below ``reference``; points outside the box add nothing."""
    inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
    area = 0.0
    ceiling = reference[1]
    for index in front_indices(inside):
        first, second = inside[index]
        area += (reference[0] - first) * (ceiling - second)
        ceiling = second
    return area
