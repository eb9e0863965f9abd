"""A job that is stopped goes on where it was, and ends as it would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import PROJECT, Ended, own_locks
from in_process import OneWorker

from optimizer.service import pool
from storage.database import Database
from storage.errors import DatabaseError
from storage.queue import jobs
from storage.records import evaluations

SMALLER_JOB = """\
model: {path: llava-12, dtype: float32}
task: easy-vqa
actions: [skip]
constraint: {max_accuracy_drop: 1.0}
search: {trials: 8, batch: 2, finalists: 1, rungs: [8]}
splits: {calibration: 4, search: 16, held_out: 32, unit: samples}
workload: {new_tokens: 1}
latency: {precision: 0.2, max_seconds: 2}
evaluation: plain
cluster: {workers: 1}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_job_is_released_and_resumed(
    number: signal.Signals, tmp_path: Path, here: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
):
    """Stopped on a cluster, and resumed on a worker in this process: what is kept is in the database."""
    (tmp_path / "job.yaml").write_text(SMALLER_JOB)
    process = subprocess.Popen(
        [sys.executable, "-m", "optimizer.cli.main", "run", "job.yaml"],
        cwd=tmp_path,
        env={**os.environ, **own_locks(tmp_path), "PYTHONPATH": str(PROJECT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    url = f"sqlite:///{tmp_path / 'skipplan.db'}"
    _wait_for_evaluations(url, 2, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ""), errors
    *progress, last = errors.splitlines()
    assert "goes on where it was" in last and all(line.startswith("[") for line in progress)
    with Database.open(url, create=False) as db:
        (job,) = jobs.list_jobs(db)
        assert job.state == "queued" and job.owner is None
        before = {(each.plan, each.split, each.n_samples): each.id for each in evaluations.for_job(db, job.id)}

    monkeypatch.setattr(pool, "_start", lambda inputs: OneWorker(inputs.spec.model.path, inputs.task))
    ended = here(tmp_path, "run", "job.yaml", "--json")
    assert ended.code in (0, 3), ended.errors  # so small a job may find no plan that is surely faster
    with Database.open(url, create=False) as db:
        after = {(each.plan, each.split, each.n_samples): each.id for each in evaluations.for_job(db, job.id)}
        assert len(jobs.list_jobs(db)) == 1
    assert json.loads(ended.output)["job"] == job.id
    assert before.items() <= after.items()  # kept, not evaluated again


def _wait_for_evaluations(url: str, count: int, process: subprocess.Popen[str]) -> None:
    path = Path(url.removeprefix("sqlite:///"))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if path.exists() and path.stat().st_size:
            # The tables may be half made at this moment.
            with suppress(DatabaseError), Database.open(url, create=False) as db:
                found = jobs.list_jobs(db)
                if found and len(evaluations.for_job(db, found[0].id)) >= count:
                    return
        time.sleep(0.1)
    pytest.fail(f"no {count} evaluations after five minutes")
