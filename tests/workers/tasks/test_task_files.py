from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from workers.errors import ImageError, TaskError
from workers.tasks import Task, TaskSpec, bundled_tasks, load_spec, load_task, parse_spec
from workers.tasks.images import ImageFile

SPEC: dict[str, Any] = {
    "name": "mine",
    "source": {"kind": "file", "path": "data.csv"},
    "prompt": "{question}",
    "answer": {"kind": "short", "max_new_tokens": 4},
    "metric": "exact_match",
    "splits": {"unit": "images", "calibration": 2, "search": 3, "held_out": 3},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(json.dumps(SPEC))
    *parents, last = path.split(".")
    target = spec
    for key in parents:
        target = target[key]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return spec


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    names = [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(tmp_path / "images" / name)
    return names


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, images: list[str]) -> Write:
    def write(rows: list[dict[str, Any]] | None = None, suffix: str = ".csv", **source: Any) -> Path:
        if rows is None:
            rows = [{"image": name, "question": f"q {turn}?", "answers": "yes"} for name in images for turn in range(2)]
        table = pd.DataFrame(rows)
        data = tmp_path / f"data{suffix}"
        if suffix == ".csv":
            table.to_csv(data, index=False)
        elif suffix == ".jsonl":
            table.to_json(data, orient="records", lines=True)
        else:
            table.to_parquet(data)
        spec = SPEC | {"source": {"kind": "file", "path": data.name, "images": "images"} | source}
        path = tmp_path / "task.yaml"
        path.write_text(yaml.safe_dump(spec))
        return path

    return write


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_three_file_formats_give_the_same_task(write: Write, suffix: str) -> None:
    task, csv = load_task(write(suffix=suffix)), load_task(write(suffix=".csv"))
    assert (task.data_hash, task.split_hash) == (csv.data_hash, csv.split_hash)
    assert [len(task.split(name)) for name in ("calibration", "search", "held_out")] == [4, 6, 6]
    assert task.search[0].question.startswith("q ") and task.search[0].answers == ("yes",)
    assert task.search[0].image.open().size == (9, 9)


def test_several_answers_come_from_a_list_or_a_separator(write: Write, images: list[str]) -> None:
    rows = [{"image": name, "question": "q", "answers": "yes|yeah | "} for name in images]
    separated = load_task(write(rows, answer_separator="|"))
    listed = load_task(write([row | {"answers": ["yes", "yeah"]} for row in rows], ".jsonl"))
    assert {sample.answers for sample in separated.search} == {("yes", "yeah")}
    assert separated.data_hash == listed.data_hash


def test_csv_text_is_not_reinterpreted(write: Write, images: list[str]) -> None:
    rows = [{"image": name, "question": "how many?", "answers": "007"} for name in images[:-1]]
    rows.append({"image": images[-1], "question": "N/A", "answers": "None"})
    answers = {sample.answers[0] for sample in _all(load_task(write(rows)))}
    assert answers == {"007", "None"}


@pytest.mark.parametrize(
    ("stored", "meant"),
    [
        (5.0, "5"),
        (np.float32(5), "5"),
        (-2.0, "-2"),
        (2.5, "2.5"),
        (1e20, "100000000000000000000"),
        (7, "7"),
        (True, "True"),
        (b"r\xc3\xa9d", "r\u00e9d"),
        (Decimal("5.00"), "5"),
    ],
)
def test_a_cell_means_the_same_whatever_type_it_is_stored_in(
    write: Write, images: list[str], stored: object, meant: str
) -> None:
    rows = [{"image": name, "question": "q", "answers": stored} for name in images]
    assert {sample.answers for sample in _all(load_task(write(rows, ".parquet")))} == {(meant,)}
    listed = [row | {"answers": [stored, stored]} for row in rows]
    assert {sample.answers for sample in _all(load_task(write(listed, ".parquet")))} == {(meant, meant)}


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("answers", b"\xff\xfe", "row 1: column 'answers' holds bytes that are no UTF-8 text"),
        ("question", b"\xff", "row 1: column 'question' holds bytes that are no UTF-8 text"),
        ("question", ["first", "second"], "row 1: column 'question' holds a list where one text is needed"),
        ("answers", [["nested"]], "row 1: column 'answers' holds a list where one text is needed"),
        ("image", {"bytes": b"x"}, "row 1: column 'image' holds a mapping where one text is needed"),
    ],
)
def test_cells_that_are_no_text_are_named(
    write: Write, images: list[str], column: str, cell: object, message: str
) -> None:
    rows = [{"image": name, "question": "q", "answers": "a"} | {column: cell} for name in images]
    with pytest.raises(TaskError, match=message):
        load_task(write(rows, ".parquet"))


def test_columns_can_be_named(write: Write, images: list[str]) -> None:
    rows = [{"file": name, "ask": "q", "reply": "no"} for name in images]
    task = load_task(write(rows, columns={"image": "file", "question": "ask", "answers": "reply"}))
    assert task.held_out[0].answers == ("no",)


def test_the_same_image_under_two_names_is_one_image(write: Write, images: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "images" / "copy.png"
    copy.write_bytes((tmp_path / "images" / "0.png").read_bytes())
    rows = [{"image": name, "question": "q", "answers": "a"} for name in [*images, "copy.png"]]
    task = load_task(write(rows))
    homes = [
        split
        for split in ("calibration", "search", "held_out")
        for sample in task.split(split)
        if isinstance(sample.image, ImageFile) and Path(sample.image.path).name in ("0.png", "copy.png")
    ]
    assert len(homes) == 2 and len(set(homes)) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.csv: not a readable csv file: it is empty"),
        ([{"image": "0.png", "answers": "a"}], "no column 'question'; it has image, answers"),
        ([{"image": "gone.png", "question": "q", "answers": "a"}], "row 1: image .*gone.png does not exist"),
        (
            [{"image": "0.png", "question": "q", "answers": "a"}, {"image": "1.png", "question": "q", "answers": ""}],
            "row 2: column 'answers' has no answer",
        ),
        ([{"image": "0.png", "question": " ", "answers": "a"}], "row 1: column 'question' is empty"),
        ([{"image": "0.png", "question": "q", "answers": "a"}], "too few images .* 8|too few images .* 1 there"),
    ],
)
def test_bad_data_is_named(write: Write, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        load_task(write(rows))
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(write: Write, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "data.csv").unlink()
    with pytest.raises(TaskError, match=r"data\.csv: no such file \(source\.path\)"):
        load_task(path)
    path = write(suffix=".jsonl")
    (tmp_path / "data.jsonl").write_text('{"image": ')
    with pytest.raises(TaskError, match=r"data\.jsonl: not a readable jsonl file: line 1 is not JSON"):
        load_task(path)
    path = write(suffix=".parquet")
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(TaskError, match=r"data\.parquet: not a readable parquet file"):
        load_task(path)


def test_a_corrupt_image_is_no_error_before_it_is_opened(write: Write, tmp_path: Path) -> None:
    (tmp_path / "images" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    task = load_task(write())
    broken = next(s for s in _all(task) if isinstance(s.image, ImageFile) and s.image.path.endswith("3.png"))
    with pytest.raises(ImageError, match=r"3\.png cannot be decoded"):
        broken.image.open()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", None, r"task: name: missing"),
        (
            "metric",
            "accuracy",
            r"task: metric: must be one of 'exact_match', 'vqa_accuracy'.*, not 'accuracy'; did you mean",
        ),
        (
            "source.kind",
            "s3",
            r"task: source\.kind: must be one of 'easy-vqa', 'scenes', 'rendered-text', 'file', 'hub', "
            r"'lmms-eval', not 's3'",
        ),
        (
            "source.path",
            "data.xlsx",
            r"task: source: .*data\.xlsx \(path\) is none of \.csv, \.tsv, \.jsonl, \.ndjson, \.parquet",
        ),
        ("splits.search", 0, r"task: splits\.search: must be greater than or equal to 1, not 0"),
        ("splits.search", True, r"task: splits\.search: must be a valid integer, not True"),
        ("splits.unit", "rows", r"task: splits\.unit: must be 'images' or 'samples', not 'rows'"),
        ("answer.kind", "long", r"task: answer\.kind: must be 'short', 'free' or 'choice', not 'long'"),
        ("answer", 3, r"task: answer: must be a mapping with fields such as kind, max_new_tokens, options, not 3"),
        ("prompt", "{query}", r"task: prompt: unknown placeholder \{query\}; allowed: \{question\}"),
        ("prompt", "{question", r"task: prompt: .*a literal brace is written twice"),
        ("promt", "x", r"task: promt: unknown field; did you mean prompt\?"),
        (
            "secondary",
            ["token"],
            r"task: secondary\.0: must be one of 'exact_match', .*, not 'token'; did you mean token_f1\?",
        ),
        (
            "source.kind",
            None,
            r"task: source\.kind: must be one of 'easy-vqa', 'scenes', 'rendered-text', 'file', 'hub', "
            r"'lmms-eval', not None",
        ),
        ("source.path", None, r"task: source\.path: missing"),
        ("source.pth", "x", r"task: source\.pth: unknown field; did you mean path\?"),
        ("source.columns", {"imag": "x"}, r"task: source\.columns\.imag: unknown field; did you mean image\?"),
        (
            "source.columns",
            [],
            r"task: source\.columns: must be a mapping with fields such as image, ",
        ),
        ("name", " ", r"task: name: must be a text that is not empty, not ' '"),
        ("secondary", "token_f1", r"task: secondary: must be a list, not 'token_f1'"),
        ("plain_prompt", "{prompt}", r"task: plain_prompt: must contain \{image\}, \{prompt\}"),
    ],
)
def test_bad_fields_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        parse_spec(changed(path, value))


def test_a_task_that_is_not_there_names_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="bundled: easy-vqa, rendered-text, scene-counts, scene-descriptions, scenes"):
        load_spec("vqav2")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(TaskError, match="not valid YAML"):
        load_spec(bad)
    bad.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(TaskError, match="not valid YAML"):
        load_spec(bad)


def test_a_field_that_is_said_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(TaskError, match=r"task\.yaml: line 2, column 1: not valid YAML: 'name' is given twice"):
        load_spec(path)


def test_a_field_that_is_null_counts_as_absent() -> None:
    assert parse_spec(SPEC | {"description": None, "splits": SPEC["splits"] | {"seed": None}}) == parse_spec(SPEC)


def test_what_identifies_a_task_stays() -> None:
    assert load_task("scenes").definition_hash.startswith("d6a1447f958db3b8")
    assert load_task("easy-vqa").definition_hash.startswith("f508f8c87c9841b8")


def test_bundled_tasks_parse() -> None:
    specs = [load_spec(name) for name in bundled_tasks()]
    assert [spec.name for spec in specs] == list(bundled_tasks())
    assert all(isinstance(spec, TaskSpec) for spec in specs)


def test_vqa_accuracy_needs_annotators(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("exact_match", "vqa_accuracy"))
    with pytest.raises(TaskError, match="vqa_accuracy needs at least 4 answers"):
        load_task(path)


def _all(task: Task) -> list[Any]:
    return [*task.calibration, *task.search, *task.held_out]
