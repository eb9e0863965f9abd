"""Calibration on several tasks: what each part alone gives, one behind the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from choice_tasks import as_choices

from workers.compensation.calibration import CalibrationBatch, GeneralText, calibrate
from workers.compensation.recipe import CompensationError
from workers.models.loading import LoadedModel
from workers.tasks import Task, join_tasks, load_spec, load_task
from workers.tasks.images import ImageFile


@pytest.fixture(scope="module")
def scenes() -> Task:
    return load_task(load_spec("scenes").with_splits(calibration=8, search=2, held_out=2))


def same(one: CalibrationBatch, other: CalibrationBatch) -> bool:
    return all(
        torch.equal(first, second)
        for name in ("vision", "answers", "kept")
        for first, second in [(getattr(one, name), getattr(other, name))]
    ) and all(map(torch.equal, one.targets, other.targets))


@pytest.mark.parametrize("chooses", [False, True])
def test_every_part_has_an_equal_share_and_is_answered_as_alone(
    tiny: LoadedModel, small_task: Task, scenes: Task, chooses: bool
) -> None:
    easy = as_choices(small_task) if chooses else small_task
    joint = join_tasks([scenes, easy])
    text = GeneralText([torch.arange(10, 40)], 0.1)
    found = calibrate(tiny, joint, tokens=501, text=text)
    alone = [calibrate(tiny, easy, tokens=250), calibrate(tiny, scenes, tokens=251)]
    batches = [batch for each in alone for batch in each.batches]
    assert len(found.batches) == len(batches) + 1 and found.batches[-1].general
    assert all(map(same, found.batches, batches))
    assert found.tokens == sum(each.tokens for each in alone) + 30
    assert found.samples == tuple(
        f"{task.name}/{sample}" for task, each in zip((easy, scenes), alone, strict=True) for sample in each.samples
    )
    assert all(each.tokens >= 250 for each in alone)
    answered = [float(batch.answers.sum()) for batch in found.batches[:-1]]
    assert min(answered) > 0


def test_what_fails_carries_its_task_s_name_and_a_part_without_samples_is_named(
    tiny: LoadedModel, small_task: Task, scenes: Task, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [replace(each, image=ImageFile(str(broken)), image_key=each.id) for each in scenes.calibration]
    found = calibrate(
        tiny, join_tasks([small_task, replace(scenes, calibration=(samples[0], *scenes.calibration[1:]))]), tokens=400
    )
    assert list(found.failed_samples) == [f"scenes/{samples[0].id}"]
    with pytest.raises(CompensationError, match="task scenes: no calibration sample can be read"):
        calibrate(tiny, join_tasks([small_task, replace(scenes, calibration=tuple(samples))]), tokens=400)
