"""Which prompts are asked, and what is read of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workers.guard.states import asking_text, one_per_image, task_features
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import prompt_text
from workers.tasks import Task, join_tasks, load_spec, load_task


def test_one_question_is_asked_about_each_image(small_task: Task) -> None:
    samples = small_task.search + small_task.search[:3]
    found = one_per_image(samples, 5)
    assert [sample.image_key for sample in found] == list(dict.fromkeys(sample.image_key for sample in samples))[:5]
    assert all(next(each for each in samples if each.image_key == sample.image_key) == sample for sample in found)


def test_parts_of_a_joint_task_that_ask_about_the_same_images_take_turns(small_task: Task) -> None:
    other = replace(small_task, spec=small_task.spec.changed(name="other"))
    joint = join_tasks([small_task, other])
    found = one_per_image(joint.search, parts=joint.parts)
    assert len({sample.image_key for sample in found}) == len(found) == 8
    assert [sample.id.split("/")[0] for sample in found] == ["easy-vqa", "other"] * 4


def test_text_stands_in_the_place_of_prompts_that_hold_no_question() -> None:
    scenes = load_task(load_spec("scenes").with_splits(calibration=1, search=1, held_out=3))
    task, samples = asking_text(scenes, scenes.held_out, " ".join(f"word{number}" for number in range(30)))
    assert [prompt_text(task.spec, sample).split() for sample in samples] == [
        [f"word{number}" for number in range(start, start + 12)] for start in (0, 12)
    ]
    assert [sample.image_key for sample in samples] == [sample.image_key for sample in scenes.held_out[:2]]


def test_features_are_means_of_what_transformers_says_the_states_are(tiny: LoadedModel, small_task: Task) -> None:
    samples = small_task.search[:3]
    found, failed = task_features(tiny, small_task, samples, (0, 2))
    assert failed == {} and {layer: rows.shape for layer, rows in found.items()} == {0: (3, 96), 2: (3, 96)}
    inputs = prepare_batch(tiny, small_task, samples[:1]).inputs
    assert inputs is not None
    with torch.inference_mode():
        states = tiny.model(**inputs, output_hidden_states=True).hidden_states
    vision = inputs["input_ids"][0] == tiny.model.config.image_token_id
    for layer in (0, 2):
        expected = torch.cat([states[layer][0][~vision].mean(0), states[layer][0][vision].mean(0)])
        torch.testing.assert_close(found[layer][0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 2])
def test_nothing_is_asked_of_no_samples(tiny: LoadedModel, small_task: Task, layer: int) -> None:
    found, _ = task_features(tiny, small_task, [], (layer,))
    assert found[layer].shape == (0, 96)
