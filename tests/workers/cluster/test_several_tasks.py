"""A worker with a joint task: parts scored as by a worker of theirs alone, everything else asked of the whole."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from choice_tasks import as_choices
from in_process import lock_apart
from PIL import Image

from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.compensation import compensator
from workers.errors import TaskError
from workers.messages import (
    AnswerDense,
    CompareLatency,
    EvaluatePlans,
    Evaluation,
    Evaluations,
    FitCompensation,
    FitGuards,
    MeasureRedundancy,
    ModelSource,
    ProfileLatency,
    ShowSamples,
)
from workers.models.prompts import prompt_text
from workers.serving.requests import chat_request
from workers.tasks import Passage, Task, TextTask, join_tasks, load_spec, load_task

PLANS = ("R" * 12, "RSRSRRSRRRRR", "RRSSSSRRSSRR")
RECIPE = "linear tokens=400"
SOURCE = ModelSource("llava-12", device="cpu", dtype="float32")
SETTINGS = WorkerSettings(0, batch_size=8, memory_bytes=1 << 28)


def task(name: str) -> Task:
    return load_task(load_spec(name).with_splits(calibration=6, search=8, held_out=8))


EASY, SCENES = as_choices(task("easy-vqa")), task("scenes")
COUNTS = task("scene-counts")
TEXT = replace(
    TextTask.of(" ".join(f"the {number} circles are red" for number in range(400))),
    search=(Passage("text-0", "the circles are red, and the square is blue"), Passage("text-2", "a large green shape")),
)
JOINT = replace(join_tasks([EASY, SCENES]), beside=(TEXT, COUNTS))


@pytest.fixture(scope="module")
def worker() -> Handler:
    return Handler.load(SOURCE, JOINT, SETTINGS)


def scored(worker: Handler, **fields: object) -> list[Evaluation]:
    reply = worker.handle(EvaluatePlans(**{"plans": PLANS, "split": "search", "n_samples": 8, **fields}))  # type: ignore[arg-type]
    assert isinstance(reply, Evaluations) and all(isinstance(each, Evaluation) for each in reply.results), reply
    return list(reply.results)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [EASY, SCENES, COUNTS], ids=lambda part: part.name)
def test_a_part_is_scored_as_by_a_worker_of_its_own(worker: Handler, part: Task) -> None:
    found, alone = scored(worker, task=part.name), scored(worker.with_task(part))
    assert [(each.sample_ids, each.scores, each.path) for each in found] == [
        (each.sample_ids, each.scores, each.path) for each in alone
    ]
    assert {each.split for each in found} == {"search"}
    if part is SCENES:  # the others are answered rightly by all of these plans, or by none
        assert len({each.scores for each in found}) > 1
    else:
        assert len({each.kl for each in found}) == len(PLANS) and {each.path for each in found} == {"fast"}
    dense = worker.handle(AnswerDense("search", 0, 4, task=part.name))
    assert dense.evaluation.scores == found[0].scores[:4]  # type: ignore[union-attr]
    shown = worker.handle(ShowSamples("search", (1, 3), task=part.name)).samples  # type: ignore[union-attr]
    assert [(each.id, each.score) for each in shown] == [
        (part.search[number].id, found[0].scores[number]) for number in (1, 3)
    ]


def test_maps_are_fitted_once_on_all_parts_and_used_for_each(worker: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, asked = worker.with_task(JOINT), []
    calibrate = compensator.calibrate
    monkeypatch.setattr(
        compensator, "calibrate", lambda *given, **how: (asked.append(given[1]), calibrate(*given, **how))[1]
    )
    found = {
        name: scored(fresh, task=name, compensation=RECIPE) for name in ("easy-vqa", "scenes", "scene-counts", "text")
    }
    assert asked == [JOINT]
    fitted = fresh.handle(FitCompensation(PLANS[1], RECIPE))
    assert fitted.samples >= 4 and asked == [JOINT]  # type: ignore[union-attr]
    for name, results in found.items():
        plainly = scored(fresh, task=name, compensation=RECIPE, path="plain")
        assert [each.sample_ids for each in results] == [each.sample_ids for each in plainly]
        if name == "text":
            assert np.allclose([each.kl for each in results], [each.kl for each in plainly], atol=1e-5)
        else:
            assert [each.scores for each in results] == [each.scores for each in plainly]
    assert {each.path for each in found["text"]} == {"fast"} == {each.path for each in found["easy-vqa"]}


def test_caches_stay_within_the_worker_s_memory_together(worker: Handler) -> None:
    dispatches = [worker.evaluations(name) for name in ("easy-vqa", "scenes", "scene-counts", "text")]
    assert sum(each._memory for each in dispatches) <= SETTINGS.memory_bytes
    assert len({id(each.plain.compensator) for each in dispatches}) == 1
    assert worker.evaluations("scenes") is dispatches[1]


def test_what_cannot_be_scored_or_asked_is_named(worker: Handler) -> None:
    known = "there are text, scene-counts, easy-vqa, scenes"
    for request in (EvaluatePlans(PLANS, "search"), AnswerDense("search", 0, 1), ShowSamples("search", (0,))):
        with pytest.raises(TaskError, match=rf"easy-vqa\+scenes: it cannot be scored as a whole; {known}"):
            worker.handle(request)
    with pytest.raises(TaskError, match=f"nothing of it is named 'other'; {known}"):
        worker.handle(EvaluatePlans(PLANS, "search", task="other"))
    for request in (AnswerDense("search", 0, 1, task="text"), ShowSamples("search", (0,), task="text")):
        with pytest.raises(TaskError, match="text: general text has no questions"):
            worker.handle(request)


def test_redundancy_is_measured_on_all_parts(worker: Handler) -> None:
    kinds = ("distance",)
    whole, *parts = (worker.with_task(each).handle(MeasureRedundancy(kinds, 0, 1)) for each in (JOINT, EASY, SCENES))
    assert whole.samples == sum(each.samples for each in parts) and not whole.failed_samples  # type: ignore[union-attr]
    for name, value in whole.kinds[kinds[0]].added.items():  # type: ignore[union-attr]
        together = sum(each.kinds[kinds[0]].added[name].astype(np.float64) for each in parts)  # type: ignore[union-attr]
        assert np.abs(value - together).sum() <= 1e-3 * together.sum()  # histograms: rounding moves a count


def test_guards_are_fitted_on_prompts_of_all_parts(
    worker: Handler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_apart(monkeypatch, tmp_path)
    found = worker.handle(FitGuards((2,), 0.2, samples=4))
    (guard,) = found.guards  # type: ignore[union-attr]
    assert (guard.fitted_on, guard.threshold_on, guard.held_out.prompts) == (12, 16, 16)


def test_latency_is_timed_on_prompts_of_the_whole(
    worker: Handler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_apart(monkeypatch, tmp_path)
    profile = worker.handle(ProfileLatency(repeats=1))
    assert profile.dense_latency_seconds > 0 and not profile.failed_samples  # type: ignore[union-attr]
    compared = worker.handle(CompareLatency(PLANS[2], precision=1.0, max_seconds=0.1))
    assert compared.speedup > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("part", [EASY, SCENES], ids=lambda part: part.name)
def test_an_engine_is_asked_what_the_part_would_ask(part: Task) -> None:
    own = [each for each in JOINT.calibration if each.id.startswith(f"{part.name}/")]
    for joint, sample in zip(own, part.calibration, strict=True):
        asked = chat_request(JOINT, joint)
        assert asked.text == prompt_text(part.spec, sample)
        picture = np.asarray(Image.open(io.BytesIO(asked.images[0])).convert("RGB"))
        assert np.array_equal(picture, np.asarray(sample.image.open().convert("RGB")))
