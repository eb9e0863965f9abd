"""The commands that the pages show in blocks and that ``--help`` gives as examples, run in their order.

They run on a tiny model and table, in a database with two finished jobs of these, in this process. What starts workers
or stays until it is stopped runs in the slow test, in processes of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import command_line
import in_process
import pytest
import tiny_llava
import typer.main
import yaml
from PIL import Image
from storage_builders import engine_latency

from optimizer.cli.main import app, main
from optimizer.job.inputs import prepare
from optimizer.job.loading import load_job
from optimizer.service import runner
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs, leases
from storage.records import engine_latencies, plans

PROJECT = Path(__file__).resolve().parents[2]
IMAGES = 14
STAND_INS = {
    "MODEL": "llava-12",
    "OWNER/NAME": "llava-12",
    "llava-1.5-7b-hf": "llava-12",
    "my-task": "receipts",
    "easy-vqa": "receipts",
    "TASK": "receipts.yaml",
    "configs/quickstart.yaml": "job.yaml",
    "postgresql://user:password@host/skipplan": "sqlite:///skipplan.db",
    "0.01": "1.0",  # 16 answers prove no smaller loss
    "0.02": "1.0",
    "256": "8",
    "configs/examples/*.yaml": " ".join(map(str, sorted((PROJECT / "configs/examples").glob("*.yaml")))),
}
SMALL: dict[str, Any] = {
    "splits": {"unit": "images", "calibration": 2, "search": 4, "held_out": 8},
    "constraint": {"max_accuracy_drop": 1.0, "min_dense_accuracy": 0},  # the model is random
    "search": {"trials": 4, "batch": 4, "finalists": 1, "rungs": [4], "latency_model": "layers"},
    "model": {"device": "cpu", "dtype": "float32"},
    "latency": {"precision": 0.5, "max_seconds": 0.5},
    "cluster": {"workers": 1},
}
ELSEWHERE = {
    "run configs/examples/smolvlm-256m-pope.yaml": "loads model and data from the hub; test_shipped_examples runs it",
    "run configs/scenes-lossless.yaml": "takes minutes; tests/end_to_end/test_lossless_job.py runs a smaller one",
    "best --model llava-12 --task scenes --lossless": "needs that job",
    "plans --lossless": "needs that job",
    "reference build smollm2-scenes": "downloads 270 MB; tests/workers/reference builds one from a small wheel",
    "run configs/smollm2-lossless.yaml": "takes a quarter of an hour; test_job_file.py reads it",
    "run configs/smollm2-four-tasks.yaml": "takes an hour; test_several_tasks_job.py runs a smaller one",
    "best --model smollm2-30-scenes --task easy-vqa+scene-counts+scenes --max-text-kl 0.3": "needs such a job",
    "reference build smollm2": "downloads 270 MB; tests/workers/reference builds one from a small wheel",
    "doctor --cluster head-node:6379": "needs a cluster; tests/optimizer/cli has doctor's answers",
    "doctor --cluster auto": "needs a cluster",
    "export 7 --format openvino --output exports/ir": "needs OpenVINO; tests/optimizer/exports can have it",
    "refit 12": "needs a plan with maps; tests/end_to_end/test_compensated_job refits one",
    "--install-completion": "writes to the shell's start file",
    "--show-completion": "asks which shell it runs in",
}
IN_PROCESSES = ("serve", "dashboard", "redundancy", "validate-theory")


def blocks(text: str) -> list[list[str]]:
    """The commands in a page's blocks, as words without ``skipplan``."""
    found = re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words[:1] == ["skipplan"]]


def examples(command: Any) -> Iterator[list[str]]:
    """The examples of a command's help and of its subcommands'."""
    for line in re.findall(r"(?:^\s*|\[/bold\] )skipplan ([^;\n]+)", command.help or "", flags=re.MULTILINE):
        yield shlex.split(line)
    for each in getattr(command, "commands", {}).values():
        yield from examples(each)


SHOWN = {
    str(page.relative_to(PROJECT)): blocks(page.read_text(encoding="utf-8"))
    for page in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("**/*.md")))
}
SHOWN = {page: commands for page, commands in SHOWN.items() if commands}
ON_PAGES = [words for commands in SHOWN.values() for words in commands]
SHOWN["--help"] = [words for words in examples(typer.main.get_command(app)) if words not in ON_PAGES]


def name_of(words: list[str]) -> str:
    """The command among the program's own options."""
    return next((word for word in words if word.replace("-", "").isalpha() and not word.startswith("-")), "")


def write_inputs(directory: Path) -> None:
    """The quickstart's task and table, with as many rows as are needed, and a model; names are the quickstart's."""
    page = (PROJECT / "docs/quickstart.md").read_text(encoding="utf-8")
    header = re.search(r"^```text\n(.*)\n", page, flags=re.MULTILINE)
    task = re.search(r"^```yaml\n(name: receipts.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert header is not None and task is not None
    tiny_llava.save(directory / "llava-12")
    small, changed = re.subn(
        r"calibration: 50, search: 150, held_out: 300", "calibration: 2, search: 4, held_out: 8", task[1]
    )
    assert changed == 1
    (directory / "receipts.yaml").write_text(small)
    (directory / "scans").mkdir()
    rows = [header[1]]
    for number in range(IMAGES):
        Image.new("RGB", (40, 40), (number * 15, 0, 0)).save(directory / "scans" / f"{number}.png")
        rows += [f"{number}.png,What is the {turn} total?,{number + 0.5:.2f}" for turn in ("first", "second")]
    (directory / "receipts.csv").write_text("\n".join(rows))
    (directory / "configs").symlink_to(PROJECT / "configs")


def make_small(job_file: Path) -> None:
    """Cut a job file that ``init`` wrote down to what 14 images and a few seconds allow."""
    job = yaml.safe_load(job_file.read_text())
    for name, value in SMALL.items():
        job[name] = job.get(name, {}) | value if isinstance(value, dict) else value
    job_file.write_text(yaml.safe_dump(job))


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["--quiet", *words])
    return stop.value.code if isinstance(stop.value.code, int) else 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the inputs, a job file that ``init`` wrote, and the database of two such jobs, run here."""
    directory = tmp_path_factory.mktemp("commands")
    write_inputs(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(tempfile, "tempdir", str(directory))  # where the device's lock lies
        assert command("init", "--model", "llava-12", "--task", "receipts.yaml") == 0
        make_small(directory / "job.yaml")
        inputs = prepare(load_job(directory / "job.yaml", environment={}))
        worker = in_process.OneWorker(inputs.spec.model.path, inputs.task)
        with Database.open(f"sqlite:///{directory / 'skipplan.db'}") as db:
            for _ in range(2):
                submitted, _ = runner.submit(db, inputs, anew=True)
                job = leases.claim(db, "me", 600, submitted.id)
                assert job is not None
                runner.process(db, job, Progress(), lambda still_held: (inputs, worker))  # type: ignore[arg-type, return-value]
                assert jobs.get(db, job.id).is_finished and plans.for_job(db, job.id)
                with db.transaction() as session:  # as if the job had named vLLM
                    served = (engine_latency(1.6), engine_latency(1.5, concurrency=16))
                    engine_latencies.write(session, {plans.for_job(db, job.id)[0].id: served})
    shutil.copy(directory / "skipplan.db", directory / "finished.db")
    return directory


def stand_in(words: list[str], db: Database) -> list[str]:
    """A command as it can be given here: for job and plan numbers, some that the database has."""
    finished, plan = [job.id for job in jobs.list_jobs(db) if job.is_finished], plans.list_plans(db)[0].id
    if words[:2] in (["jobs", "cancel"], ["jobs", "resume"]):
        stored = jobs.get(db, finished[0]).spec
        numbers = [jobs.submit(db, stored, "waiting").id for word in words if word.isdigit()]
        if words[1] == "resume":
            jobs.cancel(db, numbers[0])
    else:
        numbers = [plan] if name_of(words) in ("export", "refit") else finished
    waiting = iter(numbers)
    values = {word for option, word in pairwise(words) if option in ("--samples", "--concurrency")}
    meant = [
        str(next(waiting)) if word.isdigit() and word not in values else STAND_INS.get(word, word) for word in words
    ]
    if words[0] == "init":
        meant[meant.index("--task") + 1] = "receipts.yaml"
    if words[0] == "verify-export":
        meant += ["--task", "receipts.yaml"]  # the page's task is bundled
    return " ".join(meant).split()


def outputs(words: list[str]) -> list[Path]:
    named = [Path(words[at + 1]) for at, word in enumerate(words) if word in ("--output", "--plot")]
    return named or ([Path("job.yaml")] if words[0] == "init" else [])


@pytest.mark.parametrize("page", SHOWN)
def test_the_commands_of_a_page_run_in_their_order(
    page: str, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(prepared)
    in_process.load_exports_here(monkeypatch)
    shutil.copy("finished.db", "skipplan.db")
    shutil.rmtree("exports", ignore_errors=True)
    commands = [
        words for words in SHOWN[page] if " ".join(words) not in ELSEWHERE and name_of(words) not in IN_PROCESSES
    ]
    with Database.open("sqlite:///skipplan.db") as db:
        # Half a second on a busy machine may not tell how fast a plan is; the job then says so with exit code 3.
        busy = [3 for job in jobs.list_jobs(db) if job.state == "infeasible"]
        for words in commands:
            meant = stand_in(words, db)
            for path in outputs(meant):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            code = command(*meant)
            said = capsys.readouterr()
            assert code == 0 or (code in busy and words[0] in ("run", "jobs")), (meant, said.err)
            assert all(path.exists() for path in outputs(meant)), meant
            if words[0] == "init":
                make_small(outputs(meant)[0])


def test_what_runs_elsewhere_is_shown() -> None:
    assert set(ELSEWHERE) <= {" ".join(words) for commands in SHOWN.values() for words in commands}


def answer_of(process: subprocess.Popen[str], port: int, token: str) -> int:
    """The status with which a dashboard answers once it listens."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs", headers={"Authorization": f"Bearer {token}"})
    assert process.stderr is not None and "dashboard of" in process.stderr.readline()
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.URLError:  # not yet
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow  # Ray starts for each of five commands
def test_the_commands_that_start_workers_or_stay(prepared: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    shutil.copy(prepared / "job.yaml", tmp_path)
    ended = command_line.command(tmp_path, "run", "job.yaml")
    assert ended.code in (0, 3), ended.errors
    url = f"sqlite:///{tmp_path / 'skipplan.db'}"
    commands = {tuple(words): None for page in SHOWN.values() for words in page if name_of(words) in IN_PROCESSES}
    with Database.open(url) as db:
        for words in map(list, commands):
            meant = stand_in(words, db)
            if name_of(words) == "dashboard":
                show_dashboard(tmp_path, meant)
                continue
            if name_of(words) == "serve":
                assert command_line.command(tmp_path, "submit", "job.yaml", "--force").code == 0
                meant.append("--once")
            ended = command_line.command(tmp_path, *meant)
            assert ended.code == 0, (meant, ended.errors)
            assert all((tmp_path / path).exists() for path in outputs(meant)), meant
        assert {job.state for job in jobs.list_jobs(db)} <= {"succeeded", "infeasible"}


def show_dashboard(directory: Path, words: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = "a-token-of-enough-characters"
    process = subprocess.Popen(
        [sys.executable, "-m", "optimizer.cli.main", *words, "--port", str(port)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "SKIPPLAN_DASHBOARD_TOKEN": token},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert answer_of(process, port, token) == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    finally:
        process.kill()
        process.wait()
