"""Samples that fail among the results that a criterion is held against: left out alike for all plans, never counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from optimizer.search.space import Candidate
from optimizer.search.trial import Scores
from optimizer.stages.progress import Progress
from optimizer.validation import harm

NAN = math.nan
PLANTED = {
    "RRR": Scores((1.0, 1.0, NAN, 1.0, 0.0, 1.0), kl=(0.0, 0.0, NAN, 0.0, 0.0, 0.0)),
    "SRR": Scores((1.0, 0.0, 1.0, 1.0, 0.0, 0.0), kl=(0.5, NAN, 0.1, 0.3, 0.2, 0.4)),  # its logits hold NaN once
    "RSR": Scores((0.0, 1.0, 1.0, 1.0, NAN, 1.0), kl=(0.1, 0.9, 0.1, 0.1, NAN, 0.1)),
}
IMAGES = "aabbcc"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> harm.Measured:
    class Planted:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, asked: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
            return ((candidate, PLANTED[candidate.plan.text]) for candidate, _ in asked)

    monkeypatch.setattr(harm, "CachedEvaluation", Planted)
    samples = [SimpleNamespace(image_key=image) for image in IMAGES]
    context: Any = SimpleNamespace(
        worker=SimpleNamespace(num_layers=3), progress=Progress(), task=SimpleNamespace(split=lambda name: samples)
    )
    return harm.measure(context, ["SRR", "RSR"], 6)


def test_scores_are_compared_where_no_plan_failed(found: harm.Measured) -> None:
    kept = [0, 1, 3, 5]
    assert found.images == tuple(IMAGES[place] for place in kept)
    for plan, values in found.scores.items():
        assert values.tolist() == [PLANTED[plan].values[place] for place in kept]
    assert found.dense.tolist() == [1.0] * 4


def test_a_divergence_that_is_not_known_is_not_none(found: harm.Measured) -> None:
    kept = [0, 3, 5]
    assert found.kl_images == tuple(IMAGES[place] for place in kept)
    for plan, values in found.kl.items():
        assert values.tolist() == [PLANTED[plan].kl[place] for place in kept]
    one = found.harm("SRR", 0.95, 0)
    assert one is not None and one.kl == pytest.approx(np.mean([0.5, 0.3, 0.4])) and one.accuracy == 0.5
