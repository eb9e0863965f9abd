"""Probes: closed cases with known answers, and the penalised fit against a general optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from workers.redundancy.probes import PENALTY, _fit_and_predict, held_out_losses, probe_rows
from workers.redundancy.sums import KindSums


def test_the_fit_equals_a_general_optimiser() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(30, 6)), rng.normal(size=(9, 6))
    answers = rng.integers(0, 3, size=30)
    found = _fit_and_predict(train, answers, test, 3)
    mean = train.mean(0)
    scale = np.sqrt(((train - mean) ** 2).sum(1).mean())
    truth = np.eye(3)[answers]

    def probabilities(parameters: np.ndarray, states: np.ndarray) -> np.ndarray:
        scores = (states - mean) / scale @ parameters[:18].reshape(6, 3) + parameters[18:]
        exponentials = np.exp(scores - scores.max(1, keepdims=True))
        return exponentials / exponentials.sum(1, keepdims=True)

    def loss(parameters: np.ndarray) -> float:
        likelihood = np.log((probabilities(parameters, train) * truth).sum(1)).mean()
        return float(-likelihood + PENALTY / 2 * (parameters[:18] ** 2).sum())

    best = minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-8}).x
    assert found == pytest.approx(0.999 * probabilities(best, test) + 0.001 / 3, abs=2e-4)


def states_with_the_answer_from(depth: int, samples: int = 200, layers: int = 4) -> KindSums:
    """Random states; from a depth on, the answer can be read from them."""
    rng = np.random.default_rng(1)
    answers = rng.integers(0, 3, size=samples)
    states = rng.normal(size=(samples, layers + 1, 16)).astype(np.float32)
    states[:, depth:, :3] += 6 * np.eye(3)[answers][:, None]
    folds = np.arange(samples) % 2
    return KindSums({}, {"states": states, "answers": answers + 40, "folds": folds})


def test_gaps_are_large_where_the_answer_appears_and_nowhere_else() -> None:
    rows = {(row.name, row.layer): row for row in probe_rows(states_with_the_answer_from(3), 4)}
    for name in ("functional_gap", "information_gap"):
        gaps = [rows[name, layer].value for layer in range(4)]
        assert int(np.argmax(gaps)) == 2 and gaps[2] > 0.4
        assert all(abs(gaps[layer]) < 0.15 * gaps[2] for layer in (0, 1, 3))
    assert rows["usable_information", 3].value > 0.8 > 0.1 > rows["usable_information", 0].value
    assert rows["information_gap", 2].n == 200 and rows["information_gap", 2].standard_error < 0.1


def test_nothing_is_said_where_there_is_nothing_to_predict() -> None:
    sums = states_with_the_answer_from(2)
    same = KindSums({}, {**sums.gathered, "answers": np.full(200, 7)})
    one_fold = KindSums({}, {**sums.gathered, "folds": np.zeros(200, dtype=int)})
    empty = KindSums({}, {name: np.zeros((0,)) for name in sums.gathered})
    assert [list(probe_rows(each, 4)) for each in (same, one_fold, empty)] == [[], [], []]


def test_an_answer_unseen_in_training_has_a_finite_loss() -> None:
    states = np.random.default_rng(0).normal(size=(8, 2, 3))
    answers, folds = np.array([0, 0, 0, 1, 2, 2, 2, 2]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    log_loss, brier = held_out_losses(states, answers, folds)
    assert np.isfinite(log_loss).all() and (brier <= 2).all() and log_loss.max() > 5
