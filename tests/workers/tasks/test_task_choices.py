"""Multiple choice, answers as VQA data sets store them, and a metric of one's own."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from workers.errors import TaskError
from workers.tasks import Sample, load_task, parse_spec
from workers.tasks.metrics import CHOICE_METRICS, METRICS, VERSIONS, metric_version

SHORT = {"kind": "short", "max_new_tokens": 4}
CHOICE = {"kind": "choice"}


def task_file(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    *,
    answer: dict[str, Any] = SHORT,
    metric: str = "exact_match",
    **columns: str,
) -> Any:
    for number in range(6):
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{place % 6}.png", "question": "Which?"} | row) for place, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    document = {
        "name": "mine",
        "source": {"kind": "file", "path": "rows.jsonl", "columns": columns},
        "prompt": "{question}",
        "answer": answer,
        "metric": metric,
        "splits": {"calibration": 2, "search": 2, "held_out": 2},
    }
    return parse_spec(document, base=tmp_path)


def test_options_are_lettered_and_the_answer_is_a_letter(tmp_path: Path) -> None:
    rows = [{"options": ["red", "green"], "right": place % 2} for place in range(6)]
    task = load_task(task_file(tmp_path, rows, choices="options", answers="right"))
    samples = {sample.id: sample for sample in (*task.calibration, *task.search, *task.held_out)}
    assert samples["row-1"].question == "Which?\nA. red\nB. green"
    assert [samples[f"row-{number}"].answers for number in (1, 2)] == [("A",), ("B",)]


@pytest.mark.parametrize("right", [2, -1, "A", None, 1.5])
def test_an_answer_that_is_no_place_of_an_option(tmp_path: Path, right: object) -> None:
    rows = [{"options": ["red", "green"], "right": right}] * 6
    with pytest.raises(TaskError, match="row 1: column 'right' must be the index of an option, 0 to 1"):
        load_task(task_file(tmp_path, rows, choices="options", answers="right"))


def test_options_that_are_missing_or_too_many(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="column 'options' has no option"):
        load_task(task_file(tmp_path, [{"options": [], "right": 0}] * 6, choices="options", answers="right"))
    with pytest.raises(TaskError, match="has 27 options, more than there are letters"):
        rows = [{"options": ["x"] * 27, "right": 0}] * 6
        load_task(task_file(tmp_path, rows, choices="options", answers="right"))


def samples_of(tmp_path: Path, rows: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Sample]:
    task = load_task(
        task_file(tmp_path, rows, answer=answer, metric="multiple_choice", choices="options", answers="right")
    )
    return {sample.id: sample for sample in (*task.calibration, *task.search, *task.held_out)}


def test_options_are_scored_as_texts_or_as_letters(tmp_path: Path) -> None:
    rows = [{"options": ["red", "green", "red"], "right": place % 3} for place in range(6)]
    texts = samples_of(tmp_path, rows, CHOICE)
    assert texts["row-2"].question == "Which?"
    assert texts["row-2"].choices == ("red", "green")
    assert [texts[f"row-{number}"].answers for number in (1, 2, 3)] == [("red",), ("green",), ("red",)]
    letters = samples_of(tmp_path, rows, CHOICE | {"options": "letters"})
    assert letters["row-2"].question == "Which?\nA. red\nB. green\nC. red"
    assert (letters["row-2"].choices, letters["row-2"].answers) == (("A", "B", "C"), ("B",))


def test_options_count_for_what_a_task_is(tmp_path: Path) -> None:
    def hashes(options: list[str]) -> str:
        rows = [{"options": options, "right": 0}] * 6
        spec = task_file(tmp_path, rows, answer=CHOICE, metric="multiple_choice", choices="options", answers="right")
        return load_task(spec).data_hash

    assert hashes(["red", "green"]) != hashes(["red", "blue"])


@pytest.mark.parametrize(
    ("options", "right", "message"),
    [
        (["red"], 0, "row 1: column 'options' has 1 different option, a choice needs at least 2"),
        (["red", "red"], 0, "row 1: column 'options' has 1 different option"),
        (["red", " "], 0, "row 1: column 'options' has a blank option"),
        (["red", "green"], 2, "row 1: column 'right' must be the index of an option, 0 to 1, not '2'"),
        ([], 0, "row 1: column 'options' has no option"),
    ],
)
def test_options_that_cannot_be_chosen_among(tmp_path: Path, options: list[str], right: int, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        samples_of(tmp_path, [{"options": options, "right": right}] * 6, CHOICE)


@pytest.mark.parametrize(
    ("answer", "metric", "columns", "message"),
    [
        (CHOICE, "multiple_choice", {}, r"answer\.kind: choice needs source\.columns\.choices"),
        (
            CHOICE,
            "exact_match",
            {"choices": "options"},
            "metric exact_match cannot score choice answers; allowed: mult",
        ),
        (SHORT, "multiple_choice", {}, "metric multiple_choice cannot score short answers; allowed: "),
        (
            CHOICE | {"options": "numbers"},
            "multiple_choice",
            {"choices": "options"},
            "must be 'texts' or 'letters', not 'numb",
        ),
        (
            CHOICE | {"separator": 3},
            "multiple_choice",
            {"choices": "options"},
            r"answer\.separator: must be a valid string",
        ),
        (SHORT | {"separator": " "}, "exact_match", {}, "answer: options and separator are for kind choice"),
    ],
)
def test_choice_fields(
    tmp_path: Path, answer: dict[str, Any], metric: str, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        task_file(tmp_path, [{"options": ["a", "b"], "answers": 0}] * 6, answer=answer, metric=metric, **columns)


@pytest.mark.parametrize(
    "stored", [[{"answer": "red", "answer_id": 1}, {"answer": "Red"}], {"answer": ["red", "Red"]}, ["red", "Red"]]
)
def test_answers_of_annotators(tmp_path: Path, stored: object) -> None:
    task = load_task(task_file(tmp_path, [{"answers": stored}] * 6))
    assert task.search[0].answers == ("red", "Red")


def test_own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "def first_letter(prediction, answers):\n    return float(prediction[:1] in {a[:1] for a in answers})\n"
        "def percent(prediction, answers):\n    return 100.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint(name, f"my_metrics:{name}", METRICS.group) for name in ("first_letter", "percent")]
    monkeypatch.setattr(
        "workers.registry.entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)]
    )
    monkeypatch.setattr(METRICS, "_found", {})
    assert "first_letter" in METRICS and list(METRICS)[-1] == "percent"
    assert "my_metrics" not in sys.modules  # imported when it is looked up, not before
    metric = METRICS["first_letter"]
    assert (metric("red", ["rose"]), metric("red", ["blue"])) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"metric percent gave 100\.0; a score lies in"):
        METRICS["percent"]("red", ["red"])
    version = metric_version("first_letter")
    assert metric_version("exact_match") == str(VERSIONS["exact_match"]) != version
    with (tmp_path / "my_metrics.py").open("a") as file:
        file.write("# another")
    assert metric_version("first_letter") != version
    assert VERSIONS.keys() == {*METRICS.built_in, *CHOICE_METRICS}
