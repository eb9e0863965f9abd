"""One real job through the command line, shared by all tests of this directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import JOB, FinishedJob, command
from filelock import FileLock


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> FinishedJob:
    """A job that went all the way with ``skipplan run --json``: run once, and copied for each process of the tests."""
    base = tmp_path_factory.getbasetemp()
    original = (base if worker_id == "master" else base.parent) / "original-job"
    with FileLock(f"{original}.lock"):
        if not (original / "result.json").exists():
            original.mkdir()  # a second process does not try again what failed in the first
            (original / "job.yaml").write_text(JOB)
            ended = command(original, "run", "job.yaml", "--json")
            assert ended.code == 0, ended.errors
            assert ended.errors == ""  # nothing is said where there is no terminal
            (original / "result.json").write_text(ended.output)
    directory = Path(shutil.copytree(original, tmp_path_factory.mktemp("job") / "copy"))
    return FinishedJob(directory, directory / "job.yaml", json.loads((directory / "result.json").read_text()))


@pytest.fixture(scope="session")
def exported(finished_job: FinishedJob) -> Path:
    """The best plan's checkpoint."""
    ended = command(
        finished_job.directory, "export", str(finished_job.best["id"]), "--format", "checkpoint", "--output", "exported"
    )
    assert ended.code == 0, ended.errors
    return finished_job.directory / "exported"
