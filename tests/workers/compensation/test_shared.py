"""Maps from shared beginnings of plans are those of a plan fitted alone, bit by bit, from fewer layer executions."""

from __future__ import annotations

import random

import pytest
import torch

from workers.compensation.calibration import Calibration, calibrate
from workers.compensation.fit import fit
from workers.compensation.recipe import Recipe
from workers.compensation.shared import SharedFits
from workers.layerwise.decoder import Decoder
from workers.models.loading import LoadedModel
from workers.runtime import SkipPlan
from workers.tasks import Task


@pytest.fixture(scope="module")
def calibration(tiny: LoadedModel, small_task: Task) -> Calibration:
    return calibrate(tiny, small_task, tokens=300)


def shared(tiny: LoadedModel, calibration: Calibration, recipe: Recipe, **options: int) -> SharedFits:
    return SharedFits(Decoder(tiny.model), calibration, recipe, **options)


@pytest.mark.parametrize(
    "text",
    [
        "linear",
        "linear source=dense weighting=uniform",
        "linear drift=yes",
        "linear scope=projection",
        "linear drift=yes scope=projection weighting=uniform",
    ],
)
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_the_maps_are_those_of_each_plan_alone(
    tiny: LoadedModel, calibration: Calibration, text: str, budget: int
) -> None:
    recipe, generator = Recipe.parse(text), random.Random(text)
    letters = "RRSSFBQP" + ("" if recipe.source == "dense" else "AM")
    fits = shared(tiny, calibration, recipe, budget=budget)
    for _ in range(12):
        plan = SkipPlan.parse("".join(generator.choice(letters) for _ in range(5)) + "R")
        expected, found = fit(tiny.model, calibration, plan, recipe), fits.fit(plan)
        assert found.maps.keys() == expected.maps.keys() and found.gaps == expected.gaps
        for layer, own in expected.maps.items():
            assert torch.equal(found.maps[layer].matrix, own.matrix), (plan.text, layer)


def test_plans_that_begin_alike_share_layers_and_maps(tiny: LoadedModel, calibration: Calibration) -> None:
    fits = shared(tiny, calibration, Recipe.parse("linear"))
    first = fits.fit(SkipPlan.parse("RSRSRR"))
    assert fits.layer_executions == 2  # layers 0 and 2; nothing behind the last gap is run
    second = fits.fit(SkipPlan.parse("RSRSRS"))
    assert fits.layer_executions == 3 and second.maps[0] is first.maps[0]
    assert fits.fit(SkipPlan.parse("RSRSRR")).maps[2] is first.maps[2] and fits.layer_executions == 3
