"""``validate`` is as strict with samples as the job that would ask them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from PIL import Image

from optimizer.errors import UsageFault
from optimizer.job.inputs import prepare
from optimizer.job.loading import load_job
from optimizer.preflight.checks import check_job_file
from optimizer.stages.progress import Progress, State
from workers.tasks.loading import load_task

ROWS = 12


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Path:
    for number in range(ROWS):
        Image.new("RGB", (40, 40), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
    write(tmp_path, {})
    columns = {"image": "file", "question": "ask", "answers": "reply"}
    task = {
        "name": "mine",
        "source": {"kind": "file", "path": "d.jsonl", "columns": columns},
        "prompt": "{question}",
        "answer": {"kind": "short", "max_new_tokens": 2},
        "metric": "exact_match",
        "splits": {"unit": "images", "calibration": 2, "search": 2, "held_out": 8},
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": str(tiny_model), "device": "cpu"}, "task": "task.yaml"}))
    return path


def write(folder: Path, questions: dict[int, str]) -> None:
    rows = ({"file": f"{n}.png", "ask": questions.get(n + 1, f"what is in {n}?"), "reply": "red"} for n in range(ROWS))
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_every_prompt_goes_through_the_processor(job: Path) -> None:
    assert "12 prompts, as the model's processor makes them" in check_job_file(job, environment={}).checked
    quick = check_job_file(job, environment={}, quick=True)
    assert "6 prompts, as the model's processor makes them" in quick.checked


def test_progress_counts_the_prompts(job: Path) -> None:
    said: list[State] = []
    check_job_file(job, environment={}, progress=Progress(Mock(update=said.append)))
    assert said[0].text == f"check {job}: data and images"
    assert said[-1].text == f"check {job}: prompts 12/12"


def test_samples_that_cannot_be_asked_are_named_by_file_row_and_column(job: Path) -> None:
    write(job.parent, {7: "is <image> red?"})
    with pytest.raises(UsageFault, match=r"d\.jsonl, row 7, column 'ask': holds '<image>' in its text, a special"):
        check_job_file(job, environment={})
    write(job.parent, dict.fromkeys(range(1, 9), "the end</s>"))
    with pytest.raises(UsageFault, match=r"(row \d+, column 'ask': holds '</s>'.*){5}; and 3 more of 12 samples$"):
        check_job_file(job, environment={})


def test_quantised_models_that_nothing_here_loads_are_refused_before_anything_runs(
    job: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "quantised"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    job.write_text(job.read_text().replace(str(tiny_model), str(copy)))
    with pytest.raises(UsageFault, match=r"its weights are quantised \(awq\); .*gptqmodel"):
        check_job_file(job, environment={})


def test_other_tasks_and_the_text_are_checked_as_the_job_reads_them(job: Path, tmp_path: Path) -> None:
    other = yaml.safe_load((tmp_path / "task.yaml").read_text())
    other |= {"name": "theirs", "source": other["source"] | {"path": "theirs.jsonl"}}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(other))
    (tmp_path / "theirs.jsonl").write_text((tmp_path / "d.jsonl").read_text())
    (tmp_path / "text.txt").write_text("some text")
    beside = {"tasks": ["theirs.yaml"], "text": "text.txt", "samples": 3}
    job.write_text(yaml.safe_dump(yaml.safe_load(job.read_text()) | {"collateral": beside}))
    checked = check_job_file(job, environment={}).checked
    assert "task theirs beside it: 3 samples, every image opens" in checked
    assert f"text {tmp_path / 'text.txt'}" in checked
    assert "15 prompts, as the model's processor makes them" in checked

    asked = load_task(tmp_path / "theirs.yaml").held_out[:3]
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["ask"] == asked[1].question)
    question, row["ask"] = row["ask"], "the end</s>"
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageFault, match=r"theirs\.jsonl, row \d+, column 'ask': holds '</s>'"):
        check_job_file(job, environment={})
    row["ask"], row["file"] = question, "broken.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageFault, match=r"collateral\.tasks: .*broken\.png cannot be decoded"):
        check_job_file(job, environment={})
    with pytest.raises(UsageFault, match=r"collateral\.tasks: .*broken\.png cannot be decoded"):
        prepare(load_job(job, environment={}))
    (tmp_path / "text.txt").unlink()
    (tmp_path / "theirs.jsonl").write_text((tmp_path / "d.jsonl").read_text())
    with pytest.raises(UsageFault, match=r"collateral\.text: .*text\.txt cannot be read"):
        check_job_file(job, environment={})
