"""Pareto front and hypervolume against brute force over all pairs and over a grid."""

from hypothesis import given
from hypothesis import strategies as st

from optimizer.search.pareto import dominates, front_indices, hypervolume

grid = st.integers(0, 12).map(lambda value: value / 12)
clouds = st.lists(st.tuples(grid, grid), min_size=0, max_size=25)


@given(clouds)
def test_front_is_what_no_point_dominates(points):
    front = front_indices(points)
    undominated = {point for point in points if not any(dominates(other, point) for other in points)}
    assert {points[index] for index in front} == undominated
    assert len(front) == len(undominated)  # equal points once
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


@given(clouds, st.tuples(grid, grid))
def test_hypervolume_counts_the_dominated_cells(points, reference):
    cells = sum(
        any(point[0] <= i / 12 and point[1] <= j / 12 for point in points)
        for i in range(12)
        for j in range(12)
        if (i + 1) / 12 <= reference[0] and (j + 1) / 12 <= reference[1]
    )
    assert abs(hypervolume(points, reference) - cells / 144) < 1e-9
