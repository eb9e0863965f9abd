"""Intervals and tests against closed forms, scipy-free references and simulated coverage."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.statistics.intervals import (
    bootstrap_difference,
    difference_interval,
    effective_sample_size,
    holm_confidences,
    mcnemar_exact,
    wilson_interval,
)


def test_wilson_matches_published_values():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148 at 95 %.
    assert wilson_interval(81 / 263, 263, 0.95).low == pytest.approx(0.2553, abs=5e-5)
    assert wilson_interval(81 / 263, 263, 0.95).high == pytest.approx(0.3662, abs=5e-5)
    assert wilson_interval(15 / 148, 148, 0.95).low == pytest.approx(0.0624, abs=5e-5)
    assert wilson_interval(15 / 148, 148, 0.95).high == pytest.approx(0.1605, abs=5e-5)


@given(st.integers(1, 2000), st.data())
def test_wilson_ends_solve_the_score_equation(n, data):
    hits = data.draw(st.integers(0, n))
    interval = wilson_interval(hits / n, n, 0.9)
    assert 0 <= interval.low <= hits / n <= interval.high <= 1
    for end in (interval.low, interval.high):
        if 0 < end < 1:
            assert abs(hits / n - end) == pytest.approx(1.6448536 * math.sqrt(end * (1 - end) / n), rel=1e-5)


def test_wilson_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="share in"):
        wilson_interval(1.2, 10, 0.95)


@given(st.lists(st.sampled_from([(0, 0), (1, 1), (1, 0), (0, 1)]), min_size=1, max_size=60))
def test_mcnemar_is_the_binomial_test_on_discordant_pairs(pairs):
    dense, plan = zip(*pairs, strict=True)
    lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
    n = lost + gained
    # Sum of all outcomes that are at most as likely as the one seen, in exact fractions.
    likelihood = [Fraction(math.comb(n, k), 2**n) for k in range(n + 1)]
    expected = sum(p for p in likelihood if p <= likelihood[lost])
    assert mcnemar_exact(dense, plan) == pytest.approx(float(expected))


def test_mcnemar_survives_thousands_of_discordant_pairs():
    assert mcnemar_exact([1] * 3000 + [0] * 3000, [0] * 3000 + [1] * 3000) == 1.0
    assert mcnemar_exact([1] * 3000, [0] * 3000) == pytest.approx(0.0, abs=1e-300)


def test_effective_sample_size_of_copies_and_of_independent_samples():
    rng = np.random.default_rng(0)
    images = (rng.random(400) < 0.7).astype(float)
    copied = np.repeat(images, 5)
    groups = [str(i) for i in range(400) for _ in range(5)]
    assert effective_sample_size(copied, groups) == pytest.approx(400, rel=0.05)
    independent = (rng.random(2000) < 0.7).astype(float)
    assert effective_sample_size(independent, groups) > 1600
    assert effective_sample_size([1.0] * 10, ["a"] * 10) == 10  # no variance to share


def test_bootstrap_matches_the_clustered_standard_error():
    rng = np.random.default_rng(1)
    groups = [str(i) for i in range(300) for _ in range(4)]
    bad = np.repeat(rng.random(300) < 0.1, 4)
    dense = np.ones(1200)
    plan = np.where(bad, 0.0, 1.0)
    differences = bootstrap_difference(dense, plan, groups, seed=0)
    share = bad.mean()
    assert differences.mean() == pytest.approx(-share, abs=0.002)
    assert differences.std() == pytest.approx(math.sqrt(share * (1 - share) / 300), rel=0.1)


def test_bootstrap_of_agreement_is_as_wide_as_the_rule_of_three():
    n = 1500
    differences = bootstrap_difference([1.0] * n, [1.0] * n, [str(i // 10) for i in range(n)], seed=0)
    interval = difference_interval(differences, 0.95)
    assert 2 / n <= interval.high <= 5 / n
    assert -5 / n <= interval.low <= -2 / n


def test_bootstrap_interval_covers_at_its_confidence():
    rng = np.random.default_rng(2)
    groups = [str(i) for i in range(80) for _ in range(3)]
    covered = 0
    for trial in range(200):
        image_effect = np.repeat(rng.normal(0, 0.7, 80), 3)
        lost = rng.normal(size=240) + image_effect < -1.6
        gained = rng.normal(size=240) + image_effect > 2.2
        differences = bootstrap_difference(
            np.where(gained, 0.0, 1.0), np.where(lost & ~gained, 0.0, 1.0), groups, seed=trial, resamples=1000
        )
        scale = math.sqrt(1 + 0.49)
        truth = _normal(-2.2 / scale) - _normal(-1.6 / scale)
        interval = difference_interval(differences, 0.9)
        covered += interval.low <= truth <= interval.high
    assert 0.82 <= covered / 200 <= 0.97


def _normal(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_bootstrap_is_deterministic_and_refuses_other_samples():
    dense, plan, groups = [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], ["a", "a", "b"]
    first = bootstrap_difference(dense, plan, groups, seed=3, resamples=100)
    assert (first == bootstrap_difference(dense, plan, groups, seed=3, resamples=100)).all()
    with pytest.raises(ValueError, match="same samples"):
        bootstrap_difference(dense, plan[:2], groups, seed=3)
    with pytest.raises(ValueError, match="group names"):
        bootstrap_difference(dense, plan, groups[:2], seed=3)


def test_holm_gives_the_strictest_level_to_the_strongest_evidence():
    levels = holm_confidences([0.5, 0.001, 0.02], 0.95)
    assert levels == pytest.approx([0.95, 1 - 0.05 / 3, 1 - 0.05 / 2])
