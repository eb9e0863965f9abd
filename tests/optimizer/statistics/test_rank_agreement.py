"""Rank agreement: equal to scipy's, and its verdict can come out either way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from optimizer.statistics.rank_agreement import Agreement, rank_correlations, spearman

IMAGES = [f"image {number // 2}" for number in range(60)]


def harm(layers: int, seed: int = 0) -> np.ndarray:
    """Per layer and sample; layer l harms about l times as much as layer 1."""
    rng = np.random.default_rng(seed)
    return rng.exponential(1.0, size=(layers, 60)) * np.arange(layers)[:, None]


def agreement(risk, layers: int = 30, seed: int = 0) -> Agreement:
    return Agreement.over_layers(risk, harm(layers), IMAGES, 0.95, seed)


def test_a_criterion_that_knows_the_harm_is_said_to_predict_it() -> None:
    found = agreement(range(30))
    assert found.rho is not None and found.rho > 0.95 and found.verdict == "predicts harm"
    assert found.low is not None and 0.7 < found.low < found.rho


def test_a_criterion_that_has_it_backwards_is_said_to() -> None:
    assert agreement(range(30, 0, -1)).verdict == "predicts the opposite"


def test_scrambled_criteria_are_said_not_to_predict() -> None:
    rng = np.random.default_rng(1)
    verdicts = [agreement(rng.permutation(30), seed=number).verdict for number in range(40)]
    # A 95 % interval may exclude zero by chance, a bootstrap over 30 layers a little more often.
    assert verdicts.count("does not predict harm") >= 34
    assert verdicts.count("predicts harm") <= 5


@pytest.mark.parametrize("risk", [[1.0] * 30, list(range(30))])
def test_nothing_is_said_where_nothing_can_be(risk: list[float]) -> None:
    flat = Agreement.over_layers(risk, np.zeros((30, 60)), IMAGES, 0.95, 0)
    assert (flat.rho, flat.verdict) == (None, "cannot be said")
    assert Agreement.over_layers(risk[:3], harm(3), IMAGES, 0.95, 0).rho is None


def test_one_harmful_layer_is_too_little_to_tell_from_chance() -> None:
    one = np.zeros((12, 60))
    one[3] = 1.0
    found = Agreement.over_layers([0, 1, 2, 9, 3, 4, 5, 6, 7, 8, 1.5, 2.5], one, IMAGES, 0.95, 0)
    assert found.rho is not None and found.rho > 0.4
    assert found.low == 0.0 and found.verdict == "does not predict harm"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9)), min_size=3, max_size=20))
def test_rho_equals_scipy(pairs: list[tuple[int, float]]) -> None:
    first, second = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
    found = rank_correlations(first[None], second[None])[0]
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_infinite_risks_rank_last() -> None:
    assert spearman(np.array([1.0, np.inf, 2.0, 0.5]), np.array([1.0, 3.0, 2.0, 0.0])) == pytest.approx(1.0)


def test_interval_of_independent_pairs_is_bonett_and_wright_s() -> None:
    risk, harm_of = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    found = Agreement.of_pairs(risk, harm_of)
    rho = spearmanr(risk, harm_of).statistic
    half = 1.959963984540054 * np.sqrt((1 + rho**2 / 2) / (6 - 3))
    assert (found.rho, found.pairs) == (pytest.approx(rho), 6)
    assert (found.low, found.high) == pytest.approx((np.tanh(np.arctanh(rho) - half), np.tanh(np.arctanh(rho) + half)))
    assert Agreement.of_pairs([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).rho is None
    assert Agreement.of_pairs([1.0] * 5, risk[:5]).verdict == "cannot be said"
