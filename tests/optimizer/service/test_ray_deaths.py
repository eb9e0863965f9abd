"""Jobs whose Ray is killed under them, process by process: nothing is lost, and a service goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from processes import PROJECT, Serving, command_line, descendants, front, measured, send_kill, submit, tiny_job
from processes import wait_until_done as wait_for_jobs

from optimizer import run
from optimizer.job.spec import JobSpec
from storage.database import Database
from storage.queue import events, jobs
from storage.records import evaluations
from workers.errors import ClusterLost

AGENT, RAYLET, HEAD = b"ray::DashboardAgent", b"/raylet/raylet", b"/gcs/gcs_server"
NAMES = {AGENT: "agent", RAYLET: "raylet", HEAD: "head"}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as database:
        yield database


def spec(model: Path, evaluations_wanted: int, **fields: object) -> JobSpec:
    job = tiny_job(model, 40, workers=1)
    search = job.search.model_copy(update={"trials": evaluations_wanted})
    return job.model_copy(update={"search": search, "actions": ("skip", "freeze", "bypass"), "attempts": 1, **fields})


def of_ray(process: int, name: bytes) -> list[int]:
    """Processes of one kind among those of the Ray that this process started."""
    return [each for each in descendants(process) if name in command_line(each)]


def child_of(process: int) -> int:
    """The supervised child: what runs the command."""
    (child,) = (each for each in descendants(process) if b"optimizer.cli.main" in command_line(each))
    return child


def wait_for(condition: Callable[[], object], what: Callable[[], str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def logged(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def happened(log: Path) -> list[object]:
    return [line["event"] for line in logged(log)]


def start_run(job: JobSpec, directory: Path, **environment: str) -> subprocess.Popen[str]:
    document = job.model_dump(mode="json", exclude={"database"})
    (directory / "job.yaml").write_text(yaml.safe_dump(document))
    return subprocess.Popen(
        [sys.executable, "-m", "optimizer.cli.main", "--quiet", "run", "job.yaml"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "TMPDIR": str(directory), "RAY_TMPDIR": "/tmp", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", [AGENT, *(pytest.param(each, marks=pytest.mark.slow) for each in (RAYLET, HEAD))])
def test_run_ends_with_one_line_and_the_job_can_go_on_at_once(name, db, tiny_model, tmp_path):
    process = start_run(spec(tiny_model, 1000), tmp_path)
    try:
        wait_for(lambda: process.poll() is not None or len(jobs.list_jobs(db)) == 1, lambda: "no job")
        assert process.poll() is None, process.communicate()
        (job,) = jobs.list_jobs(db)
        wait_for(lambda: len(evaluations.for_job(db, job.id)) >= 1, lambda: "no evaluation")
        (target,) = of_ray(process.pid, name)
        assert send_kill(target)
        output, errors = process.communicate(timeout=150)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output) == (4, ""), errors
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("skipplan: ") and f"job {job.id} is back in the queue and goes on where it was" in errors
    now = jobs.get(db, job.id)
    assert (now.state, now.owner, now.attempt_limit - now.attempt) == ("queued", None, 1)
    assert events.for_job(db, job.id)[-1].kind == "cluster_lost"


@pytest.mark.slow
def test_the_python_function_raises_one_error_and_goes_on_when_called_again(db, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the device's lock lies
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    job = spec(tiny_model, 12).model_copy(update={"database": f"sqlite:///{tmp_path / 'skipplan.db'}"})
    fields = job.model_dump(mode="json")

    def kill() -> None:
        wait_for(lambda: jobs.list_jobs(db) and evaluations.for_job(db, 1), lambda: "no evaluation")
        (target,) = of_ray(os.getpid(), AGENT)
        send_kill(target)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ClusterLost, match="job 1 is back in the queue and goes on where it was"):
        run(fields)
    killer.join()
    assert (jobs.get(db, 1).state, jobs.get(db, 1).attempt) == ("queued", 1)
    done = run(fields)
    assert (done.id, done.attempt) == (1, 2) and done.state in ("succeeded", "infeasible")
    assert run(fields) == done  # which has its result


@pytest.mark.slow
@pytest.mark.parametrize("name", [AGENT, RAYLET, HEAD, b"process itself"], ids=lambda each: NAMES.get(each, "process"))
def test_a_service_goes_on_with_a_new_ray(name, db, tiny_model, tmp_path):
    # Workers go on without their raylet, until the head has missed it for some fifteen seconds.
    number = submit(db, spec(tiny_model, 600 if name == RAYLET else 60)).id
    serving = Serving.start(f"sqlite:///{tmp_path / 'skipplan.db'}", tmp_path / "serve.log")
    try:
        wait_for(lambda: len(evaluations.for_job(db, number)) >= 3, serving.log.read_text)
        (target,) = of_ray(serving.process.pid, name) if name in NAMES else (child_of(serving.process.pid),)
        assert send_kill(target)
        wait_for(lambda: "job_put_back" in happened(serving.log), serving.log.read_text, 150)
        wait_for_jobs(db, [number], [serving], 400)
        job = jobs.get(db, number)
        assert job.state in ("succeeded", "infeasible")
        assert job.attempt == 2 and job.attempt_limit == 2  # submitted with one
        assert measured(db, number) and front(db, number)
        kinds = [event.kind for event in events.for_job(db, number)]
        assert kinds.count("cluster_lost") == 1 and "retry" not in kinds and "lease_expired" not in kinds
        assert serving.stop() == 130
    finally:
        serving.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", [AGENT, RAYLET, HEAD], ids=NAMES.get)
def test_a_service_whose_ray_died_between_jobs_runs_the_next_one(name, db, tiny_model, tmp_path):
    first = submit(db, spec(tiny_model, 8)).id
    serving = Serving.start(f"sqlite:///{tmp_path / 'skipplan.db'}", tmp_path / "serve.log")
    try:
        wait_for_jobs(db, [first], [serving], 300)
        (target,) = of_ray(serving.process.pid, name)
        assert send_kill(target)
        second = submit(db, spec(tiny_model, 9)).id
        wait_for_jobs(db, [second], [serving], 300)
        assert jobs.get(db, second).state in ("succeeded", "infeasible")
        assert serving.stop() == 130
    finally:
        serving.kill()


@pytest.mark.slow
def test_a_job_that_loses_its_ray_each_time_ends_failed_with_the_reason(db, tiny_model, tmp_path):
    number = submit(db, spec(tiny_model, 60)).id
    serving = Serving.start(f"sqlite:///{tmp_path / 'skipplan.db'}", tmp_path / "serve.log", "--once")
    try:
        killed: set[int] = set()
        deadline = time.monotonic() + 900
        while not jobs.get(db, number).is_finished:
            assert time.monotonic() < deadline, serving.log.read_text()
            for each in of_ray(serving.process.pid, AGENT):
                if each not in killed:  # as soon as it is there: before anything can be recorded
                    killed.add(each)
                    send_kill(each)
            time.sleep(0.05)
        job = jobs.get(db, number)
        assert job.state == "failed" and "5 times in a row, with nothing recorded in between" in job.error
        assert serving.process.wait(120) == 0
    finally:
        serving.kill()


@pytest.mark.slow
def test_memory_that_runs_out_while_workers_load_is_one_line(db, tiny_model, tmp_path):
    low = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}  # any use is too much
    process = start_run(spec(tiny_model, 8), tmp_path, **low)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (4, ""), errors
    assert len(errors.splitlines()) == 1 and "the node's memory ran out" in errors and "cluster.workers" in errors
    assert jobs.list_jobs(db) == []  # a job that cannot begin leaves no trace
