"""One real job through the command line, shared by all tests of this directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import JOB, FinishedJob, command


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory: pytest.TempPathFactory) -> FinishedJob:
    """A job that went all the way with ``skipplan run --json``."""
    directory = tmp_path_factory.mktemp("job")
    job_file = directory / "job.yaml"
    job_file.write_text(JOB)
    ended = command(directory, "run", "job.yaml", "--json")
    assert ended.code == 0, ended.errors
    assert ended.errors == ""  # nothing is said where there is no terminal
    return FinishedJob(directory, job_file, json.loads(ended.output))


@pytest.fixture(scope="session")
def exported(finished_job: FinishedJob) -> Path:
    """The best plan's checkpoint."""
    ended = command(
        finished_job.directory, "export", str(finished_job.best["id"]), "--format", "checkpoint", "--output", "exported"
    )
    assert ended.code == 0, ended.errors
    return finished_job.directory / "exported"
