from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.messages import TOKEN_GROUPS, RedundancySums
from workers.models import LoadedModel
from workers.prompts import build_inputs
from workers.redundancy import cosine_distance, score_redundancy, token_groups
from workers.tasks import Task
from workers.tasks.samples import ImageFile


def test_cosine_distance_by_hand() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [3.0, 4.0]]])
    after = torch.tensor([[[5.0, 0.0], [0.0, 2.0], [-2.0, -2.0], [4.0, 3.0]]])
    expected = [0.0, 1.0, 2.0, 1 - 24 / 25]
    assert cosine_distance(before, after)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert cosine_distance(before.bfloat16(), after.bfloat16()).dtype == torch.float32


def test_padding_is_in_no_group() -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 9, 9, 5], [9, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    groups = token_groups(inputs, (9, 0))
    assert groups["vision"].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert groups["text"].tolist() == [[False, False, False, True], [False, True, True, True]]
    assert groups["all"].tolist() == [[False, True, True, True], [True] * 4]


def reference_distances(loaded: LoadedModel, task: Task) -> dict[str, list[list[np.ndarray]]]:
    """Per group, sample and layer the token distances; one unpadded prompt at a time, in float64 by numpy."""
    language = loaded.model.model.language_model
    rows: dict[str, list[list[np.ndarray]]] = {group: [] for group in TOKEN_GROUPS}
    for sample in task.calibration:
        inputs = build_inputs(loaded.processor, task.spec, [sample], [sample.image.open()])
        last: list[torch.Tensor] = []  # hidden_states ends with the normed state; take the one before the norm
        handle = language.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
        with torch.no_grad():
            output = loaded.model(**inputs, output_hidden_states=True)
        handle.remove()
        states = [state[0].double().numpy() for state in (*output.hidden_states[:-1], last[0])]
        vision = inputs["input_ids"][0].numpy() == loaded.processor.image_token_id
        for group, mask in (("vision", vision), ("text", ~vision), ("all", np.ones_like(vision))):
            pairs = [(x[mask], y[mask]) for x, y in pairwise(states)]
            cosines = [(x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1) for x, y in pairs]
            rows[group].append([1 - cosine for cosine in cosines])
    return rows


def test_means_and_errors_equal_a_numpy_reference(tiny: LoadedModel, small_task: Task) -> None:
    sums = score_redundancy(tiny, small_task, batch_size=6)
    reference = reference_distances(tiny, small_task)
    assert sums.samples == len(small_task.calibration)
    for group in TOKEN_GROUPS:
        for layer in range(6):
            samples = [rows[layer] for rows in reference[group]]
            tokens = np.concatenate(samples)
            assert sums.tokens[group] == len(tokens)
            assert sums.mean(group)[layer] == pytest.approx(tokens.mean(), rel=1e-5)
            assert sums.distance_squares[group][layer] == pytest.approx((tokens**2).sum(), rel=1e-5)
            residuals = np.array([(sample - tokens.mean()).sum() for sample in samples])
            count = len(samples)
            error = np.sqrt((residuals**2).sum() * count / (count - 1)) / len(tokens)
            assert sums.standard_error(group)[layer] == pytest.approx(error, rel=1e-3)


def test_shards_merge_to_the_whole(tiny: LoadedModel, small_task: Task) -> None:
    whole = score_redundancy(tiny, small_task, batch_size=1)
    shards = [score_redundancy(tiny, small_task, shard=shard, shards=3, batch_size=1) for shard in range(3)]
    merged = RedundancySums.merge(shards)
    assert (merged.tokens, merged.token_squares, merged.samples) == (whole.tokens, whole.token_squares, whole.samples)
    for group in TOKEN_GROUPS:
        assert merged.mean(group) == pytest.approx(whole.mean(group), rel=1e-12)
        assert merged.standard_error(group) == pytest.approx(whole.standard_error(group), rel=1e-9)
    assert all(shard.samples < whole.samples for shard in shards)


def test_a_layer_that_writes_into_its_input_is_measured_all_the_same(tiny: LoadedModel, small_task: Task) -> None:
    expected = score_redundancy(tiny, small_task).mean("all")
    layer = tiny.model.model.language_model.layers[2]
    # The next layer gets the same state; the tensor that came in does not hold the old one any more.
    handle = layer.register_forward_hook(lambda _, inputs, output: inputs[0].copy_(output))
    found = score_redundancy(tiny, small_task).mean("all")
    handle.remove()
    assert found == pytest.approx(expected, rel=1e-6) and found[2] > 0.01


def test_samples_without_a_usable_image_are_not_counted(tiny: LoadedModel, small_task: Task, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    first, *rest = small_task.calibration
    broken = replace(first, image=ImageFile(str(tmp_path / "broken.png")))
    some = score_redundancy(tiny, replace(small_task, calibration=(broken, *rest)))
    without = score_redundancy(tiny, replace(small_task, calibration=tuple(rest)))
    assert some.samples == without.samples == len(rest)
    assert some.mean("all") == pytest.approx(without.mean("all"), rel=1e-5)


VALUES = st.lists(st.floats(0, 1e6), min_size=2, max_size=2).map(tuple)


@st.composite
def shards(draw: st.DrawFn) -> list[RedundancySums]:
    def one() -> RedundancySums:
        layers = [{group: draw(VALUES) for group in TOKEN_GROUPS} for _ in range(4)]
        counts = [{group: draw(st.integers(0, 1000)) for group in TOKEN_GROUPS} for _ in range(2)]
        return RedundancySums(*layers, *counts, samples=draw(st.integers(0, 100)))

    return [one() for _ in range(draw(st.integers(1, 5)))]


@given(shards(), st.randoms(use_true_random=False))
def test_the_order_of_shards_does_not_matter(parts: list[RedundancySums], order: random.Random) -> None:
    merged = RedundancySums.merge(parts)
    order.shuffle(parts)
    assert RedundancySums.merge(parts) == merged
    assert RedundancySums.merge([merged]) == merged


def test_nothing_measured_is_not_a_number() -> None:
    zeros = dict.fromkeys(TOKEN_GROUPS, (0.0,))
    none = dict.fromkeys(TOKEN_GROUPS, 0)
    empty = RedundancySums(zeros, zeros, zeros, zeros, none, none, samples=0)
    assert isnan(empty.mean("text")[0]) and isnan(empty.standard_error("text")[0])
    with pytest.raises(ValueError, match="at least one"):
        RedundancySums.merge([])
