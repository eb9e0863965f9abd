"""What helps a first-time user: examples in every help, JSON everywhere, suggestions, init, validate, doctor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from PIL import Image

from optimizer.cli.diagnostics import examine
from optimizer.cli.main import _run, app
from optimizer.cli.options import write_file
from optimizer.job.loading import load_job
from storage.database import Database
from workers.compensation import store

WITHOUT_DATA = {"serve", "dashboard", "jobs cancel", "jobs resume", "jobs remove", "tokens remove"}
"""Commands that run until they are stopped, and those that only confirm what they were told to do."""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_names_the_command(name: str) -> None:
    told = COMMANDS[name].help
    assert "[bold]Example" in told
    example = told.split("[bold]Example", 1)[1]
    assert f"skipplan {name}" in example or f" {name} " in example  # global options may stand between


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in WITHOUT_DATA])
def test_every_command_that_prints_data_takes_json(name: str) -> None:
    assert "--json" in [option for parameter in COMMANDS[name].params for option in parameter.opts]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["exprt"], "Did you mean 'export'"),
        (["plans", "--sort", "sped"], "did you mean speedup?"),
        (["plans", "--databse", "x"], "did you mean --database?"),
        (["export", "7", "--ouput", "x"], "--output"),
        (["run", "task.yaml"], "is a task file, not a job file; skipplan init --model MODEL --task task.yaml writes"),
        (["validate", "misspelt-task.yaml"], "did you mean easy-vqa?"),
        (["validate", "misspelt-model.yaml"], "did you mean llava-12?"),
        (["validate", "misspelt-field.yaml"], "did you mean constraint?"),
    ],
)
def test_names_are_suggested(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text("name: mine\nsource: {kind: scenes}\nsplits: {seed: 1}\n")
    Path("misspelt-task.yaml").write_text("model: {path: llava-12}\ntask: easyvqa\n")
    Path("misspelt-model.yaml").write_text("model: {path: llava-21}\ntask: easy-vqa\n")
    Path("misspelt-field.yaml").write_text("model: {path: llava-12}\ntask: easy-vqa\nconstraints: {}\n")
    assert _run(arguments) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1


def test_init_writes_a_job_file_that_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["init", "--model", "llava-12", "--task", "scenes", "--output", "job.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    actions = ["freeze", "bypass", "skip", "skip_attention", "skip_mlp", "freeze_attention", "freeze_mlp"]
    assert told == {"output": "job.yaml", "layers": 12, "actions": actions}
    spec = load_job(Path("job.yaml"), environment={})
    assert (spec.model.path, spec.task, spec.workload.new_tokens) == ("llava-12", "scenes", 24)
    assert "12 decoder layers (0 to 11)" in Path("job.yaml").read_text()
    assert _run(["init", "--model", "llava-12", "--task", "scenes", "--output", "job.yaml"]) == 2
    assert "job.yaml: exists already; --force replaces it" in capsys.readouterr().err


def test_init_proposes_sizes_that_the_tasks_data_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(f"{number}.png")
    Path("d.csv").write_text("image,question,answers\n" + "".join(f"{n}.png,Is it {n}?,yes\n" for n in range(12)))
    task = (
        "name: mine\nsource: {kind: file, path: d.csv}\nprompt: '{question}'\nmetric: exact_match\n"
        "answer: {kind: short, max_new_tokens: 2}\nsplits: {calibration: 50, search: 150, held_out: 300}\n"
    )
    Path("task.yaml").write_text(task)
    assert _run(["init", "--model", "llava-12", "--task", "task.yaml"]) == 0
    written = Path("job.yaml").read_text()
    assert "# the task asks for 50 + 150 + 300 images, more than its data has; these fit" in written
    assert yaml.safe_load(written)["splits"] == {"calibration": 1, "search": 3, "held_out": 7, "unit": "images"}
    assert _run(["validate", "job.yaml"]) == 0
    Path("task.yaml").write_text(task.replace("300", "3000"))
    capsys.readouterr()
    assert _run(["init", "--model", "llava-12", "--task", "task.yaml", "--force"]) == 2
    assert "too few images for the splits" in capsys.readouterr().err


def test_init_finds_paths_given_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()
    Path("my task: 1.yaml").write_text(
        "name: mine\nsource: {kind: scenes}\nprompt: Describe it.\nanswer: {kind: free, max_new_tokens: 7}\n"
        "metric: token_f1\nsplits: {calibration: 2, search: 3, held_out: 4}\n"
    )
    assert _run(["init", "--model", "llava-12", "--task", "my task: 1.yaml", "--output", "jobs/job.yaml"]) == 0
    assert yaml.safe_load(Path("jobs/job.yaml").read_text())["task"] == "../my task: 1.yaml"
    assert load_job(Path("jobs/job.yaml"), environment={}).task == str(tmp_path / "my task: 1.yaml")


def test_init_says_what_is_wrong_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text-only").mkdir()
    (tmp_path / "text-only" / "config.json").write_text('{"model_type": "llama"}')
    assert _run(["init", "--model", "text-only", "--task", "easy-vqa"]) == 2
    assert "architecture 'llama' is no image-text-to-text model of transformers" in capsys.readouterr().err
    assert not (tmp_path / "job.yaml").exists()


def test_validate_tells_what_it_cannot_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hub-task.yaml").write_text(
        "name: from-hub\nsource: {kind: hub, id: owner/data, split: test}\nprompt: '{question}'\n"
        "answer: {kind: short, max_new_tokens: 4}\nmetric: exact_match\n"
        "splits: {calibration: 2, search: 2, held_out: 2}\n"
    )
    Path("job.yaml").write_text("model: {path: owner/model}\ntask: hub-task.yaml\n")
    assert _run(["validate", "job.yaml", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["unchecked"] == [
        "data set owner/data: its rows and images are on the hub",
        "model owner/model: its files are on the hub",
    ]


def test_doctor_reports_and_ends_with_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKIPPLAN_DATABASE", raising=False)
    monkeypatch.delenv("SKIPPLAN_CLUSTER_ADDRESS", raising=False)
    for variable in ("SKIPPLAN_VLLM_PYTHON", "SKIPPLAN_LLAMA_SERVER", "SKIPPLAN_OPENVINO_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    assert _run(["doctor", "--json"]) == 0
    found = {each["area"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["torch"]["state"] == found["model llava-12"]["state"] == found["task easy-vqa"]["state"] == "ok"
    assert "is not there yet; the first job creates it" in found["database"]["detail"]
    assert list(tmp_path.iterdir()) == []  # looking creates nothing
    assert (found["engine vllm"]["state"], found["engine vllm"]["detail"]) == ("note", "not there")
    assert "SKIPPLAN_VLLM_PYTHON" in found["engine vllm"]["advice"]
    monkeypatch.setenv("SKIPPLAN_VLLM_PYTHON", str(tmp_path / "absent"))

    (tmp_path / "broken.db").write_text("this is no database")
    assert _run(["--database", "sqlite:///broken.db", "doctor", "--json"]) == 4
    broken = {each["area"]: each for each in json.loads(capsys.readouterr().out)}
    assert broken["database"]["state"] == "problem"
    assert broken["database"]["advice"]
    assert "absent, which is no program" in broken["engine vllm"]["detail"]


@pytest.mark.parametrize(
    ("instructions", "state"),
    [({}, "note"), ({"avx512_bf16": True}, "ok"), ({"amx_bf16": True}, "ok"), ({"bf16": 1}, "note")],
)
def test_doctor_says_whether_the_cpu_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, instructions: dict[str, Any], state: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    (found,) = [each for each in examine("sqlite:///absent.db", "local") if each.area == "cpu bfloat16"]
    assert found.state == state
    assert ("model.dtype: auto computes in float32 instead" in found.detail) == (state == "note")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_reports_maps_and_databases_take_the_users_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "new" / "report.html", "<html>")
        store.put(str(tmp_path / "new" / "maps"), b"maps")
        Database.open(f"sqlite:///{tmp_path}/new/jobs.db").close()
    finally:
        os.umask(before)
    written = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert len(written) >= 5
    for path in written:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_validate_says_when_the_held_out_split_cannot_prove_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job = (
        "model: {{path: llava-12}}\ntask: scenes\nconstraint: {{max_accuracy_drop: {}}}\nsearch: {{finalists: 4}}\n"
        "splits: {{calibration: 4, search: 8, held_out: 40}}\nguard: {{false_alarms: null}}\n"
    )
    Path("strict.yaml").write_text(job.format(0.01))
    Path("mild.yaml").write_text(job.format(0.2))
    assert _run(["validate", "strict.yaml", "mild.yaml", "--json"]) == 0
    strict, mild = json.loads(capsys.readouterr().out)
    assert mild["notes"] == []
    (note,) = strict["notes"]
    assert "0.01 cannot be proven with 40 held-out samples" in note
    # Each image has one question, so the two added ones lose and win Poisson-like: at 98.75 % up to 4 of 42 images.
    assert "may lose 0.095 by its interval" in note
