"""One real job through the command line, shared by all tests of this directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import in_process
import pytest
from command_line import JOB, Ended, FinishedJob, command
from filelock import FileLock

from optimizer.cli.main import _run, main

STAGES = [
    "start workers",
    "profile latency",
    "check dense",
    "measure redundancy",
    "search",
    "verify held-out",
    "measure latency",
    "publish",
]


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory: pytest.TempPathFactory, worker_id: str, pytestconfig: pytest.Config) -> FinishedJob:
    """A job that went all the way with ``skipplan run --json``: run once, and copied for each process of the tests.

    It takes a minute or more, so its progress is shown as the command writes it.
    """
    base = tmp_path_factory.getbasetemp()
    original = (base if worker_id == "master" else base.parent) / "original-job"
    with FileLock(f"{original}.lock"):
        if not (original / "result.json").exists():
            original.mkdir()  # a second process does not try again what failed in the first
            (original / "job.yaml").write_text(JOB)
            with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                ended = command(original, "run", "job.yaml", "--json", shown=True)
            assert ended.code == 0, ended.errors
            stages = [line.split("] ", 1)[1].split(" 0/")[0] for line in ended.errors.splitlines()]
            assert [stage for stage in dict.fromkeys(stages) if stage in STAGES] == STAGES  # there is no terminal
            (original / "result.json").write_text(ended.output)
    directory = Path(shutil.copytree(original, tmp_path_factory.mktemp("job") / "copy"))
    return FinishedJob(directory, directory / "job.yaml", json.loads((directory / "result.json").read_text()))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs ``skipplan`` in this process, in a directory and with no settings but those given."""

    def here(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
        monkeypatch.chdir(directory)
        for name in [name for name in os.environ if name.startswith("SKIPPLAN_")]:
            monkeypatch.delenv(name)
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        said = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Ended(stop.value.code, said.out, said.err)

    return here


@pytest.fixture(scope="session")
def exported(finished_job: FinishedJob) -> Path:
    """The best plan's checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished_job.directory)
        patch.delenv("SKIPPLAN_DATABASE", raising=False)
        assert _run(["export", str(finished_job.best["id"]), "--format", "checkpoint", "--output", "exported"]) == 0
    return finished_job.directory / "exported"


@pytest.fixture(autouse=True)
def own_lock(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    in_process.lock_apart(monkeypatch, tmp_path_factory.getbasetemp())
