from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.compensation.recipe import CompensationError
from workers.compensation.sums import GapSums, solve


def problem(tokens: int, hidden: int, seed: int = 0):
    """M, X, H and weights as numpy arrays: H is a noisy linear image of M plus something else."""
    generator = np.random.default_rng(seed)
    output = generator.normal(size=(tokens, hidden))
    rest = generator.normal(size=(tokens, hidden))
    target = rest + output @ (np.eye(hidden) + generator.normal(size=(hidden, hidden)) * 0.3)
    target += 0.1 * generator.normal(size=(tokens, hidden)) + 0.5
    return output, rest + output, target, generator.uniform(0.1, 3.0, size=tokens)


def sums_of(output, state, target, weights, parts: int = 1) -> GapSums:
    pieces = [np.array_split(each, parts) for each in (output, target - state, target, weights)]
    return GapSums.merge([GapSums.of(*map(torch.from_numpy, part)) for part in zip(*pieces, strict=True)])


def reference(output, state, target, weights, ridge: float):
    """T by numpy's lstsq on the stacked problem: weighted rows, and rows that pull T to I."""
    hidden = output.shape[1]
    root = np.sqrt(weights)[:, None]
    wanted = target - (state - output)  # H - Y
    pull = np.sqrt(ridge * np.mean(np.sum(weights[:, None] * output**2, axis=0))) * np.eye(hidden)
    solution, *_ = np.linalg.lstsq(np.vstack([root * output, pull]), np.vstack([root * wanted, pull]), rcond=None)
    return solution


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1e-6, 1e-3, 1.0]), st.integers(0, 2**31))
def test_the_map_is_the_one_that_lstsq_finds(tokens: int, hidden: int, ridge: float, seed: int) -> None:
    data = problem(tokens, hidden, seed)
    solution = solve(sums_of(*data), ridge=ridge)
    matrix = reference(*data, ridge)
    scale = max(1.0, np.abs(matrix).max())
    np.testing.assert_allclose(np.eye(hidden) + solution.change.numpy(), matrix, atol=1e-6 * scale)
    output, state, target, weights = data
    left = target - state - output @ solution.change.numpy()
    share = (weights[:, None] * left**2).sum() / (weights[:, None] * target**2).sum()
    assert solution.unexplained == pytest.approx(share, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**31))
def test_shards_add_up_to_the_whole(parts: int, seed: int) -> None:
    data = problem(50, 6, seed)
    whole, merged = sums_of(*data), sums_of(*data, parts=parts)
    for name in ("gram", "cross", "residual_energy", "target_energy"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert merged.tokens == whole.tokens == 50


def test_a_gap_that_changes_nothing_leaves_the_identity_exactly() -> None:
    output, state, _, weights = problem(40, 5)
    solution = solve(sums_of(output, state, state, weights), ridge=1e-3)
    assert torch.equal(solution.change, torch.zeros(5, 5, dtype=torch.float64)) and solution.unexplained == 0.0


def test_a_large_ridge_leaves_the_plain_skip() -> None:
    sums = sums_of(*problem(40, 5))
    solution = solve(sums, ridge=1e12)
    assert solution.change.abs().max() < 1e-10
    assert solution.unexplained == pytest.approx(sums.plain_share)
    assert solve(sums, ridge=1e-3).unexplained < 0.5 * sums.plain_share


def test_states_that_are_not_numbers_are_refused() -> None:
    output, state, target, weights = problem(10, 3)
    for broken in (np.nan, np.inf):
        output[3, 1] = broken
        with pytest.raises(CompensationError, match="infinite or not numbers"):
            solve(sums_of(output, state, target, weights), ridge=1e-3)
    with pytest.raises(CompensationError, match="zero"):
        solve(sums_of(np.zeros((10, 3)), target, target, weights), ridge=1e-3)
    with pytest.raises(ValueError, match="at least one part"):
        GapSums.merge([])
