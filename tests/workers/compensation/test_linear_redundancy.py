from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.compensation.calibration import calibrate
from workers.compensation.fit import fit
from workers.compensation.linear_redundancy import linear_redundancy, tokens_for
from workers.compensation.recipe import Recipe
from workers.compensation.weighting import inverse_mean_square
from workers.models.loading import LoadedModel
from workers.runtime import SkipPlan
from workers.runtime.locate import locate
from workers.tasks import Task


def test_shares_are_the_residuals_of_numpys_least_squares(tiny: LoadedModel, small_task: Task) -> None:
    calibration = calibrate(tiny, small_task, tokens=400)
    found = {(each.layer, each.end): each for each in linear_redundancy(tiny, calibration, ridge=1e-3)}
    assert found.keys() == {(layer, end) for layer in range(6) for end in range(layer + 1, 6)}
    for layer, end in [(0, 1), (1, 4), (4, 5)]:
        outputs: list[Tensor] = []
        hook = locate(tiny.model).layers[layer].mlp.register_forward_hook(lambda m, a, out, to=outputs: to.append(out))
        with torch.no_grad():
            for batch in calibration.batches:
                locate(tiny.model).owner(*batch.args, **batch.kwargs)
        hook.remove()
        rows = [out.flatten(0, 1)[batch.kept] for out, batch in zip(outputs, calibration.batches, strict=True)]
        output = torch.cat(rows).double().numpy()
        state, target = (
            torch.cat([batch.targets[place] for batch in calibration.batches]).double().numpy()
            for place in (layer, end)
        )
        root = np.sqrt(1.0 / (target**2).mean(1))[:, None]
        pull = np.sqrt(1e-3 * ((root * output) ** 2).sum() / output.shape[1]) * np.eye(output.shape[1])
        residual = target - state
        change = np.linalg.lstsq(np.vstack([root * output, pull]), np.vstack([root * residual, 0 * pull]), rcond=None)[
            0
        ]
        share = ((root * (residual - output @ change)) ** 2).sum() / ((root * target) ** 2).sum()
        assert found[layer, end].unexplained == pytest.approx(share, rel=1e-4)
        assert found[layer, end].plain_share == pytest.approx(
            ((root * residual) ** 2).sum() / ((root * target) ** 2).sum(), rel=1e-4
        )


def test_the_first_gap_of_a_plan_leaves_what_was_predicted(
    tiny: LoadedModel, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibrate(tiny, small_task, tokens=400)
    shares = {(each.layer, each.end): each.unexplained for each in linear_redundancy(tiny, calibration, ridge=1e-3)}
    recipe = Recipe.parse("linear")
    monkeypatch.setattr("workers.compensation.fit.weigher", lambda *_: lambda _, target: inverse_mean_square(target))
    (gap,) = fit(tiny.model, calibration, SkipPlan.parse("RRSSRR"), recipe).gaps
    assert gap.unexplained == pytest.approx(shares[1, 3], rel=1e-4)


def test_wide_models_take_more_tokens() -> None:
    assert tokens_for(576) == 2048 and tokens_for(4096) == 12288
