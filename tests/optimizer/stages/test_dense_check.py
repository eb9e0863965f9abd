"""What a job says of a dense model whose answers are worth nothing, and that it says so before anything is searched."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import easy_vqa
import in_process
import pytest

from optimizer.errors import UsageFault
from optimizer.job.inputs import prepare
from optimizer.stages import dense
from optimizer.stages.dense import UselessModel
from storage.database import Database
from storage.queue import stages
from workers.messages import EvaluatePlans, ShowSamples

TASK = """\
name: mine
source: {kind: file, path: data.csv}
prompt: "%s"
answer: {kind: %s, max_new_tokens: %d}
metric: %s
splits: {calibration: 4, search: 16, held_out: 4, unit: samples}
"""


def task_file(
    directory: Path,
    answered: Callable[[str, str], str] = lambda question, answer: answer,
    *,
    prompt: str = "{question}",
    kind: str = "short",
    max_new_tokens: int = 4,
    metric: str = "exact_match",
) -> str:
    """Questions on the test images of easy-VQA, one an image, whose accepted answers are changed."""
    questions, answers, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    asked = {image: (question, answer) for question, answer, image in zip(questions, answers, images, strict=True)}
    rows = [
        (paths[image], question, answered(question, answer)) for image, (question, answer) in list(asked.items())[:40]
    ]
    with (directory / "data.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "question", "answers"), *rows])
    (directory / "task.yaml").write_text(TASK % (prompt, kind, max_new_tokens, metric))
    return str(directory / "task.yaml")


@pytest.fixture
def job(store: Database, worker: in_process.OneWorker):
    """A new job on a task file, and the one worker, which has loaded the model already."""

    def begin(task: str, **constraint: object):
        wanted = in_process.spec(task=task, splits={}, constraint=constraint, evaluation="plain")
        other = object.__new__(in_process.OneWorker)
        other.handler = worker.handler.with_task(prepare(wanted).task)
        other.info, other.size, other.requests = worker.info, 1, []
        return in_process.context(store, other, wanted), other

    return begin


def test_a_good_model_passes_and_its_answers_are_not_asked_for_again(job, tmp_path: Path) -> None:
    context, worker = job(task_file(tmp_path))
    check = dense.run(context)
    assert check.accuracy > 0.8 and check.warning == "" and check.n_samples == 16
    assert [type(request) for request in worker.requests] == [EvaluatePlans]
    dense.run(context)
    assert len(worker.requests) == 1  # read back


WRONG = {"yes": "no", "no": "yes"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answered": lambda q, a: WRONG.get(a, "teapot")}, ["not above chance: accuracy 0.000 on 16", "accepted "]),
        ({"prompt": "so"}, ["not above chance"]),
        ({"answered": lambda q, a: "yes"}, ["not above chance", "always answering 'yes' gives 1.000"]),
        (
            {"answered": lambda q, a: f"it is {a}", "metric": "token_f1", "max_new_tokens": 1, "kind": "free"},
            ["all of 16 answers are cut at answer.max_new_tokens: 1", " (cut), accepted 'it is "],
        ),
    ],
    ids=["wrong labels", "prompt without question", "one answer", "cut"],
)
def test_a_useless_one_ends_the_job_and_shows_three_samples(job, tmp_path: Path, store, change, words) -> None:
    context, worker = job(task_file(tmp_path, **change))
    with pytest.raises(UselessModel) as raised:
        dense.run(context)
    text = "\n".join([str(raised.value), *raised.value.details])
    assert all(word in text for word in words), text
    assert len(raised.value.details) == 3
    assert all("prompt '" in each and "answer '" in each and "accepted '" in each for each in raised.value.details)
    assert "min_dense_accuracy: 0" in text and "\n" not in str(raised.value)
    assert {type(request) for request in worker.requests} <= {EvaluatePlans, ShowSamples}
    assert stages.stages(store, context.job.id) == {} and raised.value.exit_code == 2


def test_equal_answers_are_named_where_the_metric_gives_them_something(job, tmp_path: Path) -> None:
    task = task_file(tmp_path, lambda q, a: f"yes {a}", prompt="is there not a shape?", metric="token_f1")
    with pytest.raises(UselessModel, match="answers 'no' to all of 16 different samples"):
        dense.run(job(task)[0])


def test_with_the_floor_lowered_it_goes_on_and_says_so(job, tmp_path: Path) -> None:
    task = task_file(tmp_path, lambda q, a: WRONG.get(a, "teapot"))
    check = dense.run(job(task, min_dense_accuracy=0)[0])
    assert check.accuracy == 0 and "not above chance" in check.warning


def test_a_floor_above_chance_holds_by_itself(job, tmp_path: Path) -> None:
    half = iter(range(100))
    task = task_file(tmp_path, lambda q, a: a if next(half) % 2 else "teapot")
    with pytest.raises(UsageFault, match=r"below min_dense_accuracy 0\.9"):
        dense.run(job(task, min_dense_accuracy=0.9)[0])


def test_commands_that_publish_no_plan_are_warned_and_go_on(job, tmp_path: Path, store: Database) -> None:
    context, worker = job(task_file(tmp_path))
    assert dense.warn(context) == ""
    assert dense.run(context).warning == "" and len(worker.requests) == 1  # a later job has the evaluation already
    half = iter(range(100))
    strict, _ = job(task_file(tmp_path, lambda q, a: a if next(half) % 2 else "teapot"), min_dense_accuracy=0.9)
    assert "below min_dense_accuracy 0.9" in dense.warn(strict)
    useless, _ = job(task_file(tmp_path, lambda q, a: WRONG.get(a, "teapot")))
    assert dense.warn(useless).startswith("the dense model is not above chance: accuracy 0.000 on 16 search samples")
    assert "says little" in dense.warn(useless) and stages.stages(store, useless.job.id) == {}
