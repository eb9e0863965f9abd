"""Maps of a model whose decoder adds features of the images to the states between its first layers (Qwen3-VL)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_video_families
import torch
from numpy.typing import NDArray

from workers.compensation.compensator import Compensator
from workers.compensation.linear_redundancy import linear_redundancy
from workers.compensation.recipe import Recipe
from workers.messages import ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply
from workers.runtime.locate import locate
from workers.tasks import Task

RECIPE = Recipe.parse("linear weighting=uniform tokens=1000000")
LAYERS = tiny_video_families.LAYERS
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def compensator(tmp_path_factory: pytest.TempPathFactory, small_task: Task) -> Compensator:
    directory = tiny_video_families.save(tmp_path_factory.mktemp("qwen3-vl") / "model", "qwen3_vl")
    made = Compensator(load_model(ModelSource(str(directory), device="cpu")), small_task)
    made.calibration(RECIPE)  # before hooks and plans are on the model
    return made


def first_skippable(loaded: LoadedModel) -> int:
    """The layer behind the last one that features are added behind."""
    return len(loaded.model.config.vision_config.deepstack_visual_indexes)


def seen(compensator: Compensator, plan: str, module: Any, reader: Any) -> tuple[Floats, Floats]:
    """What a module gives, and the states that a later layer is given, of all real tokens under a plan."""
    given: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    model, found = compensator.loaded.model, []
    hooks = [
        module.register_forward_hook(lambda _, args, output: given.append(output)),
        reader.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0]), with_kwargs=True),
    ]
    with torch.no_grad(), apply(model, SkipPlan.parse(plan)):
        for batch in compensator.calibration(RECIPE).batches:
            locate(model).owner(*batch.args, **batch.kwargs)
            found.append([each.pop().flatten(0, 1)[batch.kept].double().numpy() for each in (given, read)])
    for hook in hooks:
        hook.remove()
    outputs, states = zip(*found, strict=True)
    return np.concatenate(outputs), np.concatenate(states)


def best(outputs: Floats, missing: Floats) -> Floats:
    """The change of a map by lstsq."""
    pull = np.sqrt(RECIPE.ridge * np.mean((outputs**2).sum(0))) * np.eye(outputs.shape[1])
    return np.linalg.lstsq(np.vstack([outputs, pull]), np.vstack([missing, 0 * pull]), rcond=None)[0]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_gap_gives_the_next_layer_what_it_is_given_in_the_dense_model(compensator: Compensator, kept: int) -> None:
    layers = list(locate(compensator.loaded.model).layers)
    gap = first_skippable(compensator.loaded) + kept
    plan = "R" * gap + "S" + "R" * (LAYERS - gap - 1)
    holder, reader = layers[gap - 1].mlp, layers[gap + 1]
    outputs, pruned = seen(compensator, plan, holder, reader)
    _, dense = seen(compensator, "R" * LAYERS, holder, reader)
    expected = best(outputs, dense - pruned)
    maps = compensator.maps(SkipPlan.parse(plan), RECIPE.text)
    assert maps is not None
    found = maps[gap - 1].change.numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    shares = {
        (own.layer, own.end): own.plain_share
        for own in linear_redundancy(compensator.loaded, compensator.calibration(RECIPE), ridge=RECIPE.ridge)
    }
    missing = np.mean(((dense - pruned) ** 2).sum(1) / (dense**2).sum(1))
    assert shares[gap - 1, gap] == pytest.approx(missing, rel=1e-4)
