"""Calibration on several tasks: what each part alone gives, one behind the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from choice_tasks import as_choices

from workers.compensation.calibration import CalibrationBatch, GeneralText, calibrate
from workers.compensation.recipe import CompensationError
from workers.compensation.weighting import weigher
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


def test_parts_weigh_the_same_whatever_the_length_of_their_answers(
    tiny: LoadedModel, small_task: Task, scenes: Task
) -> None:
    found = calibrate(
        tiny, join_tasks([scenes, small_task]), tokens=500, text=GeneralText([torch.arange(10, 40)], 0.25)
    )
    weigh = weigher("answers", found)
    totals: dict[tuple[int, str], float] = {}
    for batch in found.batches:
        weights = weigh(batch, torch.ones(len(batch.kept), 4))  # of mean square 1
        kinds = {
            "answers": batch.kept_answers,
            "vision": batch.kept_vision & ~batch.kept_answers,
            "prompt": ~batch.kept_vision & ~batch.kept_answers,
        }
        for name, chosen in {"text": torch.ones_like(batch.kept_vision)}.items() if batch.general else kinds.items():
            key = (-1 if batch.general else batch.part, name)
            totals[key] = totals.get(key, 0.0) + float(weights[chosen].sum())
    text = totals.pop((-1, "text"))
    assert set(totals) == {(part, name) for part in (0, 1) for name in ("answers", "vision", "prompt")}
    assert list(totals.values()) == pytest.approx([0.75 * found.kept / 6] * 6)
    assert text == pytest.approx(0.25 * found.kept)


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
