"""Bad inputs of every kind: the exit code, one line that names the field or file, no traceback, nothing stored."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import pytest
import ray
from command_line import PROJECT, Ended, FinishedJob, command
from in_process import OneWorker
from PIL import Image

from optimizer.exports import document
from optimizer.service import pool
from storage.database import Database
from storage.pareto import Group
from storage.records import lookup, plans
from workers.tasks import load_task

JOB = """\
model: {path: llava-12}
task: task.yaml
actions: [skip]
search: {trials: 2}
cluster: {workers: 1}
"""
TASK = """\
name: mine
source: {kind: file, path: data.csv}
prompt: "{question}"
answer: {kind: short, max_new_tokens: 4}
metric: exact_match
splits: {calibration: 2, search: 2, held_out: 2}
"""


def no_change(directory: Path) -> None:
    """Leave the directory as it is."""


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Overwrite a file."""

    def change(directory: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(data)

    return change


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace text in a file that must hold it."""

    def change(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))

    return change


def append(text: str) -> Callable[[Path], None]:
    """Append to the job file."""
    return lambda directory: (directory / "job.yaml").write_text(JOB + text) and None


def model_directory(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Let the job use a copy of the reference model that was changed."""

    def prepare(directory: Path) -> None:
        shutil.copytree(PROJECT / "configs" / "reference" / "llava-12", directory / "model")
        change(directory / "model")
        replace("job.yaml", "llava-12", "./model")(directory)

    return prepare


def truncate_weights(model: Path) -> None:
    (weights,) = model.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)


def only_pickled_weights(model: Path) -> None:
    for weights in model.glob("*.safetensors"):
        weights.rename(model / "pytorch_model.bin")


def plan_file(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Write the finished job's plan as ``plan.json``, changed; no longer a plan where the change returns a text."""

    def prepare(directory: Path) -> None:
        with Database.open(f"sqlite:///{directory / 'skipplan.db'}", create=False) as db:
            plan = plans.get(db, 1)
            described = document.describe(plan, lookup.model(db, plan.model_id), lookup.task(db, plan.task_id))
        content = json.loads(described.to_json())
        (directory / "plan.json").write_text(json.dumps(content) if (text := change(content)) is None else str(text))

    return prepare


def put(part: str, name: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Set a field of one part of a plan file."""
    return lambda content: content[part].update({name: value})


RUN = ("run", "job.yaml")
IMPORT = ("import", "plan.json")


@dataclass(frozen=True)
class Case:
    name: str
    code: int
    words: tuple[str, ...]
    change: Callable[[Path], None] = no_change
    arguments: tuple[str, ...] = RUN
    environment: dict[str, str] = field(default_factory=dict)
    slow: bool = False
    """It starts a cluster as another case does; the check itself has a test of its own where it is made."""


OWN_PROCESS = {
    "no such job file",  # one that stands for all
    "protected layer that is not there",
    "more memory than there is",
}
"""Cases in processes of their own; the others run in the tests' own, which for some of them is on a cluster."""
ON_A_CLUSTER = {"cluster too small"}

CASES = [
    # job files
    Case("no such job file", 2, ("nothing.yaml", "no such job file"), arguments=("run", "nothing.yaml")),
    Case("job file is a directory", 2, ("images", "is a directory"), arguments=("run", "images")),
    Case("not YAML", 2, ("job.yaml", "line 2", "not valid YAML"), write("job.yaml", "model: x\n  task: [")),
    Case("not a mapping", 2, ("job.yaml", "mapping"), write("job.yaml", "- a\n- b\n")),
    Case("not text", 2, ("job.yaml", "UTF-8"), write("job.yaml", b"\xff\xfe\x00\x80")),
    Case("empty", 2, ("job.yaml", "mapping"), write("job.yaml", "")),
    Case("unknown field", 2, ("serch", "did you mean search"), append("serch: {}\n")),
    Case(
        "unknown nested field", 2, ("constraint.max_drop", "max_accuracy_drop"), append("constraint: {max_drop: 1}\n")
    ),
    Case("field twice", 2, ("'task' is given twice", "line 6"), append("task: easy-vqa\n")),
    Case("no model", 2, ("model", "missing"), replace("job.yaml", "model: {path: llava-12}\n", "")),
    Case("model is a number", 2, ("model", "mapping", "path"), replace("job.yaml", "{path: llava-12}", "5")),
    Case("trials is a word", 2, ("search.trials", "'many'"), replace("job.yaml", "ls: 2", "ls: many")),
    Case("no trials", 2, ("search.trials", "greater than or equal to 1"), replace("job.yaml", "ls: 2", "ls: 0")),
    Case("drop in points", 2, ("constraint.max_accuracy_drop", "3"), append("constraint: {max_accuracy_drop: 3}\n")),
    Case("certain", 2, ("constraint.confidence", "less than 1"), append("constraint: {confidence: 1.0}\n")),
    Case("unknown action", 2, ("actions", "'skp'", "did you mean skip"), replace("job.yaml", "[skip]", "[skp]")),
    Case("no action", 2, ("actions",), replace("job.yaml", "[skip]", "[]")),
    Case("unknown strategy", 2, ("search.strategy", "'tpe'"), replace("job.yaml", "ls: 2", "ls: 2, strategy: tpr")),
    Case("rungs shrink", 2, ("search.rungs", "grow"), replace("job.yaml", "ls: 2", "ls: 2, rungs: [9, 3]")),
    Case("rung too large", 2, ("search.rungs", "2 samples"), replace("job.yaml", "ls: 2", "ls: 2, rungs: [900]")),
    Case(
        "code in YAML", 2, ("not valid YAML", "constructor"), append("database: !!python/object/apply:os.getcwd []\n")
    ),
    Case("workers by environment", 2, ("cluster.workers",), environment={"SKIPPLAN_CLUSTER_WORKERS": "several"}),
    Case(
        "protected layer that is not there", 2, ("protect", "layer 99", "0..11"), append("protect: [99]\n"), slow=True
    ),
    # tasks
    Case("unknown task", 2, ("nothing", "easy-vqa", "scenes"), replace("job.yaml", "task.yaml", "nothing")),
    Case("task field unknown", 2, ("task.yaml: metrics", "metric?"), replace("task.yaml", "metric:", "metrics:")),
    Case("unknown metric", 2, ("metric", "exact_match"), replace("task.yaml", "exact_match", "exactly")),
    Case("unknown placeholder", 2, ("prompt", "{question}"), replace("task.yaml", "{question}", "{query}")),
    Case("splits too large", 2, ("splits", "too few images"), replace("task.yaml", "search: 2", "search: 2000")),
    Case("no such data file", 2, ("data.tsv",), replace("task.yaml", "data.csv", "data.tsv")),
    Case("no such column", 2, ("data.csv", "'answers'", "answer"), replace("data.csv", "answers", "answer")),
    Case("empty cell", 2, ("data.csv", "row 1", "question"), replace("data.csv", "what is 0?", "")),
    # images
    Case("image missing", 2, ("3.png", "row 4"), lambda directory: (directory / "images" / "3.png").unlink()),
    Case("image corrupt", 2, ("3.png", "cannot be decoded"), write("images/3.png", b"\x89PNG\r\n\x1a\n and no more")),
    Case("image is text", 2, ("3.png", "cannot be decoded"), write("images/3.png", "a red circle")),
    # models
    Case("unknown model", 2, ("/nothing", "llava-12"), replace("job.yaml", "llava-12", "./nothing")),
    Case("model without config", 2, ("config.json",), model_directory(lambda model: (model / "config.json").unlink())),
    Case("corrupt config", 2, ("config.json",), model_directory(write("config.json", "{"))),
    Case("truncated weights", 2, ("safetensors",), model_directory(truncate_weights)),
    Case("pickled weights", 2, ("safetensors",), model_directory(only_pickled_weights)),
    # databases and clusters
    Case("database type", 4, ("mysql",), environment={"SKIPPLAN_DATABASE": "mysql://u:secret@host/db"}),
    Case("database URL", 4, ("URL",), arguments=("--database", "nonsense", *RUN)),
    Case(
        "no database server",
        4,
        ("127.0.0.1",),
        environment={"SKIPPLAN_DATABASE": "postgresql://u:secret@127.0.0.1:9/d"},
    ),
    Case("no directory for the database", 4, ("no/where",), arguments=(*RUN, "--database", "sqlite:///no/where/x.db")),
    Case("not a database", 4, ("data.csv",), arguments=(*RUN, "--database", "sqlite:///data.csv")),
    Case("no database yet", 4, ("other.db",), arguments=("--database=sqlite:///other.db", "jobs", "list")),
    Case("no cluster", 4, ("127.0.0.1:9", "nothing answers"), environment={"SKIPPLAN_CLUSTER_ADDRESS": "127.0.0.1:9"}),
    Case("cluster address", 4, ("cluster", "host:port"), environment={"SKIPPLAN_CLUSTER_ADDRESS": "somewhere"}),
    Case("cluster too small", 4, ("4000", "CPU"), environment={"SKIPPLAN_CLUSTER_WORKERS": "4000"}),
    # plan files
    Case("no such plan file", 2, ("plan.json", "cannot be read"), arguments=IMPORT),
    Case("plan file is cut off", 2, ("plan.json", "no valid plan"), plan_file(lambda p: json.dumps(p)[:99]), IMPORT),
    Case(
        "plan file of a later version", 2, ("schema_version",), plan_file(lambda p: p.update(schema_version=3)), IMPORT
    ),
    Case("plan file without a plan", 2, ("plan", "required"), plan_file(lambda p: p.pop("plan") and None), IMPORT),
    Case("plan too short", 2, ("3 letters", "12 layers"), plan_file(lambda p: p.update(plan="RSR")), IMPORT),
    Case("plan of other letters", 2, ("plan:", "pattern"), plan_file(lambda p: p.update(plan="X" * 12)), IMPORT),
    Case("plan of no model", 2, ("model.fingerprint",), plan_file(put("model", "fingerprint", "../../x")), IMPORT),
    Case("accuracy of a plan is NaN", 2, ("dense_accuracy",), plan_file(put("figures", "dense_accuracy", nan)), IMPORT),
    Case(
        "plan that takes no time",
        2,
        ("figures.latency_seconds",),
        plan_file(put("figures", "latency_seconds", 0.0)),
        IMPORT,
    ),
    Case("plan of an unknown field", 2, ("figures.run",), plan_file(put("figures", "run", "code")), IMPORT),
    # plans and options
    Case("unknown plan", 2, ("plan 77",), arguments=("export", "77", "--output", "out")),
    Case("plan is no number", 2, ("PLAN", "integer"), arguments=("export", "best", "--output", "out")),
    Case("no plan named", 2, ("--model", "--task"), arguments=("export", "--output", "out")),
    Case(
        "unknown format",
        2,
        ("zip", "plan, checkpoint"),
        arguments=("export", "1", "--format", "zip", "--output", "out"),
    ),
    Case("no output", 2, ("--output",), arguments=("export", "1")),
    Case("output below a file", 2, ("job.yaml/x",), arguments=("export", "1", "--output", "job.yaml/x")),
    Case(
        "unknown model in the database",
        2,
        ("llava-13", "llava-12"),
        arguments=("best", "--model", "llava-13", "--task", "t"),
    ),
    Case(
        "unknown task in the database",
        2,
        ("easy", "easy-vqa"),
        arguments=("best", "--model", "llava-12", "--task", "easy"),
    ),
    Case("drop in points for best", 2, ("max-accuracy-drop",), arguments=("best", "--max-accuracy-drop", "3")),
    Case("unknown state", 2, ("done", "succeeded"), arguments=("jobs", "list", "--state", "done")),
    # the queue and the service
    Case("no such job to show", 2, ("no job 77",), arguments=("jobs", "show", "77")),
    Case("no such job to watch", 2, ("no job 77",), arguments=("jobs", "watch", "77")),
    Case("job that is done cancelled", 2, ("succeeded already",), arguments=("jobs", "cancel", "1")),
    Case("job that is done resumed", 2, ("only failed and cancelled",), arguments=("jobs", "resume", "1")),
    Case("no number of a job", 2, ("JOB", "integer"), arguments=("jobs", "remove", "first")),
    Case("priority out of range", 2, ("priority",), arguments=("submit", "job.yaml", "--priority", "5000")),
    Case("priority is a word", 2, ("priority", "'high'"), append("priority: high\n")),
    Case("no attempts", 2, ("attempts", "greater than or equal to 1"), append("attempts: 0\n")),
    Case("no memory", 2, ("cluster.memory_per_worker",), replace("job.yaml", "workers: 1", "memory_per_worker: 0")),
    Case(
        "more memory than there is",
        4,
        ("60000 GiB of memory", "missing"),
        replace("job.yaml", "workers: 1", "workers: 1, memory_per_worker: 60000"),
        slow=True,
    ),
    Case(
        "pickle by path",
        2,
        ("model.allow_pickle", "without a path"),
        replace("job.yaml", "llava-12", "llava-12, allow_pickle: [../weights.bin]"),
    ),
    Case(
        "latency of another kind",
        2,
        ("search.latency_model", "'profile'", "'layer'"),
        replace("job.yaml", "ls: 2", "ls: 2, latency_model: layer"),
    ),
    Case("unknown log format", 2, ("--log-format", "text or json"), arguments=(*RUN, "--log-format", "xml")),
    Case("log format by environment", 2, ("SKIPPLAN_LOG", "text or json"), environment={"SKIPPLAN_LOG": "logfmt"}),
    Case("study of no job", 2, ("no job 77",), arguments=("export-study", "77", "--storage", "sqlite:///s.db")),
    Case("no storage for a study", 4, ("--storage",), arguments=("export-study", "1", "--storage", "nonsense")),
    Case("unknown command", 2, ("rnu",), arguments=("rnu", "job.yaml")),
    Case("unknown option", 2, ("--fast",), arguments=(*RUN, "--fast")),
]


@pytest.fixture
def directory(finished_job: FinishedJob, tmp_path: Path) -> Path:
    """A good job on a small task of its own, beside a database that holds a finished job."""
    shutil.copy(finished_job.directory / "skipplan.db", tmp_path)
    (tmp_path / "images").mkdir()
    rows = ["image,question,answers"]
    for number in range(6):  # as many as the three splits take, so that each one is used
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        rows.append(f"images/{number}.png,what is {number}?,red")
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def contents(directory: Path) -> list[str]:
    """Everything the database holds."""
    with sqlite3.connect(directory / "skipplan.db") as connection:
        return list(connection.iterdump())


def listing(directory: Path) -> list[str]:
    """The files that are there, SQLite's own beside a database left out."""
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(("-wal", "-shm")))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * case.slow, id=case.name) for case in CASES]
)
def test_bad_input(
    case: Case,
    directory: Path,
    here: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if case.name in ON_A_CLUSTER:
        request.getfixturevalue("ray_cluster")
    else:  # whatever test came before in this process
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    case.change(directory)
    before, files = contents(directory), listing(directory)
    if case.name in OWN_PROCESS:
        ended = command(directory, *case.arguments, environment=case.environment)
    else:
        ended = here(directory, *case.arguments, environment=case.environment)
    assert ended.code == case.code, ended.errors
    assert ended.output == ""
    *progress, error = ended.errors.splitlines()
    assert all(re.match(r"\[\d+:\d\d\] ", line) for line in progress), ended.errors
    for word in case.words:
        assert word in error
    assert "Traceback" not in ended.errors and "secret" not in ended.errors
    assert contents(directory) == before
    assert listing(directory) == files


def test_debug_shows_the_traceback(directory: Path, here: Callable[..., Ended]):
    ended = here(directory, "run", "nothing.yaml", "--debug")
    assert ended.code == 2 and "Traceback" in ended.errors
    assert ended.errors.splitlines()[-1] == "skipplan: nothing.yaml: no such job file"


def test_a_constraint_nobody_can_meet(
    directory: Path, here: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a worker in this process: how long its layers take is all that decides."""
    worker = OneWorker("llava-12", load_task(directory / "task.yaml"))
    monkeypatch.setattr(pool, "_start", lambda inputs: worker)
    replace("job.yaml", "llava-12", "llava-12, dtype: float32")(directory)  # faster where bfloat16 is emulated
    append("constraint: {min_speedup: 900}\nworkload: {new_tokens: 1}\nlatency: {max_seconds: 2}\n")(directory)
    ended = here(directory, *RUN, "--quiet")
    assert ended.code == 3
    assert len(ended.errors.splitlines()) == 1 and "dense model is the answer" in ended.errors
    assert "no plan can meet min_speedup 900: the fastest is predicted to run" in ended.errors
    assert ended.output.endswith(": infeasible\n")
    assert "infeasible" in here(directory, "jobs", "list", "--json").output
    again = here(directory, *RUN)
    assert again.code == 3 and "dense model is the answer" in again.errors


def frozen_plan(directory: Path) -> plans.Plan:
    """A plan with a frozen layer, imported beside the job's own."""
    with Database.open(f"sqlite:///{directory / 'skipplan.db'}", create=False) as db:
        known = plans.list_plans(db)[0]
        figures = plans.PlanFigures(
            plan="F" + "R" * 11,
            n_samples=10,
            accuracy=0.9,
            accuracy_low=0.8,
            accuracy_high=1.0,
            dense_accuracy=0.9,
            difference=0.0,
            difference_low=-0.1,
            difference_high=0.1,
            confidence=0.95,
            dense_latency_seconds=1.0,
            latency_seconds=0.9,
            speedup=1.1,
            speedup_low=1.0,
            speedup_high=1.2,
            dense_kv_cache_bytes=10,
            kv_cache_bytes=10,
            layers_touched=1,
        )
        device_id = lookup.ensure_device(db, known.device)
        (plan,) = plans.import_plans(
            db,
            Group(known.model_id, known.task_id, device_id, known.workload),
            figures=[figures],
        )
        return plan


def test_a_plan_that_a_checkpoint_cannot_express_is_refused_with_the_formats_that_can(
    directory: Path, here: Callable[..., Ended]
):
    plan = frozen_plan(directory)
    refused = here(directory, "export", str(plan.id), "--format", "checkpoint", "--output", "out")
    assert refused.code == 2 and not (directory / "out").exists()
    assert "(freeze)" in refused.errors and refused.errors.strip().endswith("formats that can: plan, runtime, vllm")
    assert here(directory, "export", str(plan.id), "--format", "plan", "--output", "out").code == 0


def flip_a_bit(model: Path) -> None:
    (weights,) = model.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_a_plan_is_refused_on_another_model(directory: Path, here: Callable[..., Ended]):
    model_directory(flip_a_bit)(directory)
    refused = here(directory, "export", "1", "--model-path", "model", "--output", "out")
    assert refused.code == 2 and "fingerprint" in refused.errors and not (directory / "out").exists()
