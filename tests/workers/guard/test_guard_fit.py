"""The Gaussian against formulas written out, the threshold against its definition, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.errors import MeasurementError
from workers.guard.fit import conformal_threshold, fit_gaussian
from workers.guard.needs import guard_layer, needed_prompts
from workers.runtime.guard import Guard
from workers.runtime.plan import SkipPlan


def prompts(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixed * 3 + 5


def guard_of(features: Tensor, threshold: float = 1.0) -> Guard:
    return Guard(
        "ab", 1, **vars(fit_gaussian(features)), threshold=threshold, false_alarms=0.1, fitted_on=1, threshold_on=1
    )


def plain_scores(fitted: Tensor, asked: Tensor) -> list[float]:
    """Squared Mahalanobis distances, the covariance of Ledoit and Wolf (2004), section 3.3, sum by sum."""
    mean, scale = fitted.double().mean(0), fitted.double().std(0, correction=0)
    rows = (fitted.double() - mean) / scale
    n, p = rows.shape
    sample = torch.zeros(p, p, dtype=torch.float64)
    for row in rows:
        sample += torch.outer(row, row) / n
    m = sum(float(sample[i, i]) for i in range(p)) / p
    d2 = float((sample - m * torch.eye(p)).square().sum()) / p
    b2 = sum(float((torch.outer(row, row) - sample).square().sum()) / p for row in rows) / n**2
    b2 = min(b2, d2)
    shrunken = b2 / d2 * m * torch.eye(p, dtype=torch.float64) + (d2 - b2) / d2 * sample
    inverse = torch.linalg.inv(shrunken)
    found = []
    for row in (asked.double() - mean) / scale:
        found.append(float(row @ inverse @ row))
    return found


@pytest.mark.parametrize(("count", "width"), [(12, 30), (200, 6), (30, 30)])
def test_scores_are_mahalanobis_distances_under_the_covariance_of_ledoit_and_wolf(count: int, width: int) -> None:
    fitted, asked = prompts(count, width), prompts(9, width, seed=1)
    assert guard_of(fitted).score(asked).tolist() == pytest.approx(plain_scores(fitted, asked), rel=2e-4)


def test_a_feature_that_never_varied_tells_others_apart() -> None:
    """Prompts that all ask the same thing have the same states of text."""
    fitted = prompts(50, 8)
    fitted[:, :4] = 2.5
    asked = fitted[:2].clone()
    asked[1, 0] = 2.6
    same, other = guard_of(fitted).score(asked).tolist()
    assert math.isfinite(same) and other > 20 * same


def test_prompts_that_are_all_alike_admit_their_like_alone() -> None:
    fitted = torch.full((5, 4), 3.0)
    same, other = guard_of(fitted).score(torch.tensor([[3.0] * 4, [3.0, 3.0, 3.0, 4.0]])).tolist()
    assert same == 0 and other > 1e3


def test_states_that_are_no_numbers_are_outside() -> None:
    guard = guard_of(prompts(20, 6), threshold=1e9)
    assert guard.inside(torch.stack([prompts(1, 6)[0], torch.full((6,), math.nan)])).tolist() == [True, False]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=60),
    st.floats(0.02, 0.9),
)
def test_of_prompts_in_any_order_no_larger_share_is_sent_away_than_stated(values: list[int], rate: float) -> None:
    """Each of n + 1 prompts is equally likely to be the one asked: the share over all of them is the probability."""
    if len(values) - 1 < needed_prompts(rate):
        with pytest.raises(MeasurementError, match=r"raise splits\.search"):
            conformal_threshold(torch.tensor(values[1:], dtype=torch.float64), rate)
        return
    sent = 0
    for place, asked in enumerate(values):
        others = torch.tensor(values[:place] + values[place + 1 :], dtype=torch.float64)
        sent += asked > conformal_threshold(others, rate)
    assert sent <= rate * len(values) + 1e-9
    if len(set(values)) == len(values):
        assert sent > rate * len(values) - 1  # and no smaller one than whole prompts allow


def test_coverage_of_a_fitted_guard_on_fresh_prompts() -> None:
    """The whole of it, drawn anew 60 times: the mean share of false alarms is the rate, within four standard errors."""
    rate, shares = 0.05, []
    for seed in range(60):
        drawn = prompts(40 + 99 + 400, 10, seed=seed)
        unset = guard_of(drawn[:40])
        threshold = conformal_threshold(unset.score(drawn[40:139]), rate)
        shares.append(float((unset.score(drawn[139:]) > threshold).double().mean()))
    mean = torch.tensor(shares).mean().item()
    error = torch.tensor(shares).std().item() / math.sqrt(len(shares))
    assert abs(mean - rate) < 4 * error


def test_a_rate_names_the_images_it_needs() -> None:
    assert [needed_prompts(rate) for rate in (0.01, 0.05, 0.1, 0.5)] == [99, 19, 9, 1]
    for rate in (0.01, 0.03, 0.1):
        needed = needed_prompts(rate)
        conformal_threshold(torch.rand(needed), rate)
        with pytest.raises(MeasurementError, match=f"{rate:g} needs {needed} images in the search split, which has"):
            conformal_threshold(torch.rand(needed - 1), rate)


@pytest.mark.parametrize(
    ("plan", "compensated", "layer"),
    [
        ("RRRRSS", False, 2),
        ("RRRRSS", True, 2),
        ("RRSRRR", True, 1),
        ("RRSRRR", False, 2),
        ("RSSRRR", True, 0),
        ("RSSRRR", False, 1),
        ("SRRRRR", True, 0),
        ("RFSRRR", True, 1),
        ("BRRRRR", False, 0),
        ("RSSSSS", False, 0),
        ("RRRRRR", False, 2),
    ],
)
def test_a_guard_reads_below_all_that_the_plan_changes(plan: str, compensated: bool, layer: int) -> None:
    assert guard_layer(SkipPlan.parse(plan), compensated=compensated) == layer
