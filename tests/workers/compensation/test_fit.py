"""Fits on a small random LLaVA, held against states taken from plain forward passes and numpy's lstsq."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.compensation.calibration import (
    FIRST_BATCH,
    Calibration,
    CalibrationBatch,
    Holders,
    by_image,
    calibrate,
)
from workers.compensation.fit import Fitted, fit
from workers.compensation.recipe import CompensationError, Recipe
from workers.evaluation.plain import PlainEvaluator
from workers.messages import ModelSource
from workers.models.fed_answers import append_answers
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply
from workers.runtime.folding import GapMap
from workers.runtime.gaps import gaps
from workers.runtime.locate import locate
from workers.tasks import Task
from workers.tasks.spec import Answer

ALL = 10**6
LINEAR = Recipe.parse(f"linear tokens={ALL}")


@pytest.fixture(scope="module")
def calibration(tiny: LoadedModel, small_task: Task) -> Calibration:
    return calibrate(tiny, small_task, tokens=ALL)


def fitted(tiny: LoadedModel, calibration: Calibration, plan: str, text: str = LINEAR.text) -> Fitted:
    return fit(tiny.model, calibration, SkipPlan.parse(plan), Recipe.parse(text))


def states(tiny: LoadedModel, calibration: Calibration, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """M and the state behind a dense-numbered layer, of the real tokens, under whatever plan is applied.

    M is what the MLP gave or, where it is not called, attention.
    """
    outputs, found = [], []
    module = LAYERS_OF[id(tiny.model)][layer]
    part = module.self_attn if "forward" in vars(module.mlp) else module.mlp
    hooks = [
        part.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out)),
        module.register_forward_hook(lambda m, a, out: found.append(out)),
    ]
    rows: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in calibration.batches:
            locate(tiny.model).owner(*batch.args, **batch.kwargs)
            pair = [each.pop().flatten(0, 1)[batch.kept] for each in (outputs, found)]
            rows.append((pair[0], pair[1]))
    for hook in hooks:
        hook.remove()
    output, state = (torch.cat(each).double().numpy() for each in zip(*rows, strict=True))
    return output, state


LAYERS_OF: dict[int, list[Any]] = {}


@pytest.fixture(autouse=True)
def dense_layers(tiny: LoadedModel) -> None:
    LAYERS_OF.setdefault(id(tiny.model), list(locate(tiny.model).layers))


def targets(calibration: Calibration, layer: int) -> np.ndarray:
    return torch.cat([batch.targets[layer] for batch in calibration.batches]).double().numpy()


def token_weights(calibration: Calibration, target: np.ndarray) -> np.ndarray:
    """Of weighting ``answers``: 1 / mean square of the target, every part of a prompt weighing the same in total."""
    vision, answers = (
        torch.cat([getattr(batch, name) for batch in calibration.batches]).numpy()
        for name in ("kept_vision", "kept_answers")
    )
    parts = [vision & ~answers, ~vision & ~answers, answers]
    return sum(part / part.sum() for part in parts) / (target**2).mean(1)


def best_map(output: np.ndarray, state: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """T by lstsq."""
    hidden = output.shape[1]
    root = np.sqrt(weights)[:, None]
    pull = np.sqrt(LINEAR.ridge * np.mean((weights[:, None] * output**2).sum(0))) * np.eye(hidden)
    wanted = target - (state - output)
    return np.linalg.lstsq(np.vstack([root * output, pull]), np.vstack([root * wanted, pull]), rcond=None)[0]


def test_calibration_holds_whole_samples_with_the_dense_answers(
    tiny: LoadedModel, small_task: Task, calibration: Calibration
) -> None:
    assert calibration.samples == tuple(sample.id for sample in by_image(small_task.calibration))
    assert calibration.kept == calibration.tokens
    for own in calibration.holders.values():
        assert set(own.shares.values()) == {1.0} and len(own.shares) == 6 and not own.refusals
    assert sum(int(batch.vision.sum()) for batch in calibration.batches) == 16 * len(calibration.samples)
    few = calibrate(tiny, small_task, tokens=1)
    assert few.samples == calibration.samples[:1] and len(few.batches) == 1
    for layer in range(6):
        _, state = states(tiny, calibration, layer)
        assert np.array_equal(state, targets(calibration, layer))


def test_answers_follow_their_prompts() -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "token_type_ids": torch.ones(2, 3, dtype=torch.long),
        "pixel_values": torch.zeros(2, 4),
    }
    found = append_answers(inputs, [torch.tensor([1, 2]), torch.tensor([3])], pad=0)
    assert found["input_ids"].tolist() == [[0, 5, 6, 1, 2], [7, 8, 9, 3, 0]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert found["token_type_ids"].tolist() == [[1, 1, 1, 0, 0]] * 2 and found["pixel_values"].shape == (2, 4)


@pytest.mark.parametrize("plan", ["RRSRRR", "RSSRRR", "SRRRRS", "RRRSSS", "RRARRR", "RRMRRR", "ASSRRR", "RMSSRR"])
def test_one_gap_gets_the_map_that_lstsq_finds(tiny: LoadedModel, calibration: Calibration, plan: str) -> None:
    result = fitted(tiny, calibration, plan)
    ((layer, own),) = result.maps.items()
    with apply(tiny.model, SkipPlan.parse(plan)):
        output, state = states(tiny, calibration, layer)
    target = targets(calibration, own.end)
    weights = token_weights(calibration, target)
    expected = best_map(output, state, target, weights)
    np.testing.assert_allclose(own.matrix.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    left = target - (state - output) - output @ expected
    weights = weights[:, None]
    (gap,) = result.gaps
    assert gap.unexplained == pytest.approx((weights * left**2).sum() / (weights * target**2).sum(), rel=1e-3)
    assert gap.plain_share == pytest.approx((weights * (target - state) ** 2).sum() / (weights * target**2).sum())
    assert gap.unexplained < gap.plain_share


@pytest.mark.parametrize("plan", ["RRSRRR", "RSSRRR", "SRRRRS", "RASRRR", "RRMRRR"])
def test_the_whole_projection_gets_the_change_that_lstsq_finds(
    tiny: LoadedModel, calibration: Calibration, plan: str
) -> None:
    result = fitted(tiny, calibration, plan, LINEAR.text + " scope=projection")
    ((layer, own),) = result.maps.items()
    given: list[Tensor] = []
    module = LAYERS_OF[id(tiny.model)][layer]
    projection = module.self_attn.o_proj if plan[layer] == "M" else module.mlp.down_proj
    with apply(tiny.model, SkipPlan.parse(plan)):
        hook = projection.register_forward_pre_hook(lambda m, a: given.append(a[0]))
        _, state = states(tiny, calibration, layer)
        hook.remove()
    rows = [rows.flatten(0, 1)[batch.kept] for rows, batch in zip(given, calibration.batches, strict=True)]
    inputs, target = torch.cat(rows).double().numpy(), targets(calibration, own.end)
    root = np.sqrt(token_weights(calibration, target))[:, None]
    pull = np.sqrt(LINEAR.ridge * np.mean(((root * inputs) ** 2).sum(0))) * np.eye(inputs.shape[1])
    expected = np.linalg.lstsq(
        np.vstack([root * inputs, pull]),
        np.vstack([root * (target - state), np.zeros((len(pull), state.shape[1]))]),
        rcond=None,
    )[0]
    assert own.matrix.shape == (projection.in_features, projection.out_features)
    np.testing.assert_allclose(own.matrix.numpy(), expected, atol=2e-4 * np.abs(expected).max())
    (gap,) = result.gaps
    left = (root * (target - state - inputs @ expected)) ** 2
    assert gap.unexplained == pytest.approx(left.sum() / ((root * target) ** 2).sum(), rel=1e-3)
    output_alone = fitted(tiny, calibration, plan).gaps[0]
    assert gap.unexplained < output_alone.unexplained


def test_later_maps_are_fitted_on_the_compensated_model(tiny: LoadedModel, calibration: Calibration) -> None:
    plan = SkipPlan.parse("RSRSRS")
    result = fitted(tiny, calibration, plan.text)
    assert [(gap.layer, gap.end) for gap in result.gaps] == [(0, 1), (2, 3), (4, 5)]
    for gap in result.gaps:
        # Folded maps below, the plain skip at this gap: the states that this gap's map was fitted on.
        below = SkipPlan.parse(plan.text[: gap.layer + 1] + "R" * (5 - gap.layer))
        with apply(tiny.model, below, {layer: own for layer, own in result.maps.items() if layer < gap.layer}):
            output, state = states(tiny, calibration, gap.layer)
        target = targets(calibration, gap.end)
        expected = best_map(output, state, target, token_weights(calibration, target))
        found = result.maps[gap.layer].matrix.numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("text", "drift", "places"),
    [
        ("RSRRSR", True, [(0, 1), (2, 2), (3, 4), (5, 5)]),
        ("RAMRSR", False, [(1, 1), (2, 2), (3, 4)]),
        ("MRASRR", True, [(0, 0), (1, 1), (2, 3), (4, 4), (5, 5)]),
    ],
)
def test_drift_and_missing_parts_are_taken_back_on_the_compensated_model(
    tiny: LoadedModel, calibration: Calibration, text: str, drift: bool, places: list[tuple[int, int]]
) -> None:
    plan = SkipPlan.parse(text)
    result = fitted(tiny, calibration, plan.text, LINEAR.text + (" drift=yes" if drift else ""))
    assert [(gap.layer, gap.end) for gap in result.gaps] == places
    for gap in result.gaps:
        below = SkipPlan.parse(plan.text[: gap.layer + 1] + "R" * (5 - gap.layer))
        identity = GapMap(gap.layer, gap.layer, torch.eye(len(calibration.batches[0].targets[0][0])))
        above = {
            own.layer: replace(identity, layer=own.layer, end=own.end, part=own.part)
            for own in gaps(below, drift=drift)
        }
        with apply(tiny.model, below, above | {k: own for k, own in result.maps.items() if k < gap.layer}):
            output, state = states(tiny, calibration, gap.layer)
        target = targets(calibration, gap.end)
        expected = best_map(output, state, target, token_weights(calibration, target))
        found = result.maps[gap.layer].matrix.numpy()
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
        assert gap.unexplained < gap.plain_share


def test_fitting_from_dense_states_alone_ignores_the_gaps_below(tiny: LoadedModel, calibration: Calibration) -> None:
    text = LINEAR.text + " source=dense"
    both = fitted(tiny, calibration, "RSRSRR", text)
    alone = fitted(tiny, calibration, "RRRSRR", text)
    assert torch.equal(both.maps[2].matrix, alone.maps[2].matrix)
    bottom_up = fitted(tiny, calibration, "RSRSRR")
    assert not torch.allclose(bottom_up.maps[2].matrix, both.maps[2].matrix, atol=1e-2)
    assert torch.allclose(bottom_up.maps[0].matrix, both.maps[0].matrix, atol=1e-5)


def test_answers_are_read_from_the_last_tokens_of_every_row(
    tiny: LoadedModel, small_task: Task, calibration: Calibration
) -> None:
    samples = by_image(small_task.calibration)
    given = PlainEvaluator(tiny, small_task).answer(SkipPlan.dense(6), samples).tokens
    limit = small_task.spec.answer.max_new_tokens
    rows = [row for batch in calibration.batches for row in zip(batch.answers, _real(batch), strict=True)]
    for sample, (answers, real) in zip(samples, rows, strict=True):
        assert answers.sum() == min(len(given[sample.id]) + 1, limit)
        assert torch.equal(answers.nonzero().flatten(), real.nonzero().flatten()[-int(answers.sum()) :])


def _real(batch: CalibrationBatch) -> Tensor:
    real = torch.zeros(batch.vision.numel(), dtype=torch.bool)
    real[batch.kept] = True
    return real.view(batch.vision.shape)


def test_uniform_weights_count_every_token_alike(tiny: LoadedModel, calibration: Calibration) -> None:
    own = fitted(tiny, calibration, "RRSRRR", f"linear tokens={ALL} weighting=uniform").maps[1]
    with apply(tiny.model, SkipPlan.parse("RRSRRR")):
        output, state = states(tiny, calibration, 1)
    target = targets(calibration, 2)
    expected = best_map(output, state, target, np.ones(len(target)))
    np.testing.assert_allclose(own.matrix.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_compensation_brings_the_logits_closer_to_dense(tiny: LoadedModel, calibration: Calibration) -> None:
    plan = SkipPlan.parse("RSRSRR")
    (batch, *_) = calibration.batches
    owner, maps = locate(tiny.model).owner, fitted(tiny, calibration, plan.text).maps

    def last_states() -> Tensor:
        with torch.no_grad():
            return owner(*batch.args, **batch.kwargs).last_hidden_state.flatten(0, 1)[batch.kept]

    dense = last_states()
    with apply(tiny.model, plan):
        plain = (last_states() - dense).norm()
    with apply(tiny.model, plan, maps):
        assert (last_states() - dense).norm() < 0.8 * plain
    assert torch.equal(last_states(), dense)


def test_a_frozen_layer_before_a_gap_holds_a_map_for_text_alone(tiny: LoadedModel, calibration: Calibration) -> None:
    result = fitted(tiny, calibration, "RRFSRR")
    own = result.maps[2]
    vision = torch.cat([batch.kept_vision for batch in calibration.batches]).numpy()
    outputs: list[Tensor] = []
    found: list[np.ndarray] = []
    with apply(tiny.model, SkipPlan.parse("RRFRRR")) as applied:
        layer = locate(tiny.model).layers[2]
        mlp_hook = layer.mlp.register_forward_hook(lambda m, a, out: outputs.append(out))
        hook = layer.register_forward_hook(lambda m, a, out: found.append(out))
        with torch.no_grad():
            for batch in calibration.batches:
                applied.vision_mask = batch.vision
                locate(tiny.model).owner(*batch.args, **batch.kwargs)
        mlp_hook.remove()
        hook.remove()
    states_at = [
        out.flatten(0, 1)[batch.kept].double().numpy() for out, batch in zip(found, calibration.batches, strict=True)
    ]
    state = np.concatenate(states_at)[~vision]
    # Every sample has its text tokens in one rectangle; its padding repeats a row and is left out by the mask.
    text_rows = []
    for out, batch in zip(outputs, calibration.batches, strict=True):
        mask = ~batch.vision
        real = torch.zeros(batch.vision.numel(), dtype=torch.bool)
        real[batch.kept] = True
        for row in range(len(mask)):
            places = mask[row].nonzero().flatten()
            text_rows.append(out[row, : len(places)][real.view(mask.shape)[row, places]])
    output = torch.cat(text_rows).double().numpy()
    target = targets(calibration, 3)
    weights = token_weights(calibration, target)[~vision]
    expected = best_map(output, state, target[~vision], weights)
    np.testing.assert_allclose(own.matrix.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_equal_fits_are_equal_bit_by_bit(tiny: LoadedModel, small_task: Task, calibration: Calibration) -> None:
    again = calibrate(tiny, small_task, tokens=ALL)
    first, second = (fitted(tiny, each, "RSRSSR") for each in (calibration, again))
    assert first.maps.keys() == second.maps.keys()
    assert all(torch.equal(first.maps[layer].matrix, second.maps[layer].matrix) for layer in first.maps)


def test_what_does_not_fit_into_memory_is_drawn_with_the_seed(tiny: LoadedModel, small_task: Task) -> None:
    budget = 6 * 48 * 4 * 50
    kept = [calibrate(tiny, small_task, tokens=ALL, seed=seed, memory_budget=budget) for seed in (0, 0, 1)]
    assert [each.kept for each in kept] == [50, 50, 50] and kept[0].tokens > 50
    places = [torch.cat([batch.kept for batch in each.batches]).tolist() for each in kept]
    assert places[0] == places[1] != places[2]
    answers, vision = (
        sum(int(mask.sum()) for mask in masks) for masks in zip(*map(_masks, kept[0].batches), strict=True)
    )
    all_answers = sum(int(batch.answers.sum()) for batch in calibrate(tiny, small_task, tokens=ALL).batches)
    assert answers == min(50 // 3, all_answers) and abs(vision - (50 - answers) / 2) <= 1
    assert all(len(target) == len(batch.kept) for batch in kept[0].batches for target in batch.targets)


def _masks(batch: CalibrationBatch) -> tuple[Tensor, Tensor]:
    return batch.kept_answers, batch.kept_vision & ~batch.kept_answers


def test_a_plan_without_gaps_needs_no_maps(tiny: LoadedModel, calibration: Calibration) -> None:
    for plan in ("RRRRRR", "SSRRRR", "RFFBRR", "RQPRRR"):
        assert fitted(tiny, calibration, plan).maps == {}


def test_missing_parts_are_not_compensated_on_dense_states(tiny: LoadedModel, calibration: Calibration) -> None:
    with pytest.raises(CompensationError, match=r"layer 1: A \(skip_attention\) is not compensated with source dense"):
        fitted(tiny, calibration, "RARRRR", LINEAR.text + " source=dense")


def test_a_layer_that_cannot_hold_a_map_is_named(tiny: LoadedModel, calibration: Calibration) -> None:
    refusing = Calibration(
        calibration.batches,
        calibration.samples,
        calibration.tokens,
        calibration.kept,
        {"mlp": Holders({0: 1.0}, {1: "layer 1 cannot"})},
    )
    with pytest.raises(CompensationError, match="layer 1 cannot"):
        fitted(tiny, refusing, "RRSRRR")


def test_the_batches_are_of_a_fixed_size(calibration: Calibration) -> None:
    assert all(len(batch.vision) == FIRST_BATCH for batch in calibration.batches[:-1])


def test_each_image_is_asked_once_before_any_is_asked_twice(small_task: Task) -> None:
    ordered = by_image(small_task.calibration)
    assert sorted(sample.id for sample in ordered) == sorted(sample.id for sample in small_task.calibration)
    images = len({sample.image_key for sample in ordered})
    assert images < len(ordered) and len({sample.image_key for sample in ordered[:images]}) == images


CHOICE = {"kind": "choice", "max_new_tokens": 4, "options": "texts"}


@pytest.mark.parametrize("is_choice", [False, True])
def test_samples_that_the_model_cannot_answer_are_left_out(
    tiny_directory: Path, tiny: LoadedModel, small_task: Task, is_choice: bool
) -> None:
    poisoned = load_model(ModelSource(str(tiny_directory), device="cpu"))
    word = poisoned.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        poisoned.model.get_input_embeddings().weight[word] = float("nan")
    samples = [replace(each, question="is it red?") for each in small_task.calibration[:5]]
    if is_choice:
        samples = [replace(each, answers=("yes",), choices=("yes", "no")) for each in samples]
        spec = small_task.spec.changed(answer=Answer.model_validate(CHOICE), metric="multiple_choice")
        small_task = replace(small_task, spec=spec)
    rest = (*samples[:2], *samples[3:])
    samples[2] = replace(samples[2], question="triangle?")
    found = calibrate(poisoned, replace(small_task, calibration=tuple(samples)), tokens=ALL)
    expected = calibrate(tiny, replace(small_task, calibration=rest), tokens=ALL)
    assert found.failed_samples == {samples[2].id: "the logits hold NaN"}
    assert found.samples == expected.samples and found.tokens == expected.tokens
    plan = SkipPlan.parse("RRSRRR")
    maps, alike = (fit(tiny.model, each, plan, LINEAR).maps for each in (found, expected))
    assert torch.equal(maps[1].matrix, alike[1].matrix)
