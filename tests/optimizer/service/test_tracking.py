"""Jobs in MLflow: a real server holds what the database holds; without one no job fails.

The server needs MLflow in an environment of its own, ``SKIPPLAN_MLFLOW_PYTHON``, and its client beside skipplan
(``pip install 'skipplan[mlflow]'``); the slow tests are skipped without either.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_builders import SPEC, finished_job

from optimizer.service import tracking
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs, leases
from storage.records import evaluations, plans

JOB: dict[str, Any] = {"model": {"path": "llava-12"}, "task": "easy-vqa", "search": {"trials": 4}, "tracking": "mlflow"}


class Notes:
    """Keeps what a job says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, state: Any) -> None:
        pass

    def note(self, text: str) -> None:
        self.texts.append(text)


def ended_job(db: Database, spec: dict[str, Any], notes: Notes, fail: str | None = None) -> int:
    """A claimed job that is tracked while it comes to its end."""
    jobs.submit(db, spec, "hash")
    job = leases.claim(db, "me", 600)
    assert job is not None
    with tracking.tracked(db, job, Progress(notes)):
        leases.fail(db, job, fail) if fail else leases.finish(db, job)
    return job.id


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracking.URI, raising=False)


def test_a_job_that_does_not_ask_is_not_tracked(db: Database, quiet: None) -> None:
    notes = Notes()
    ended_job(db, {name: value for name, value in JOB.items() if name != "tracking"}, notes)
    assert notes.texts == []


def test_without_an_address_the_job_says_so_and_goes_on(db: Database, quiet: None) -> None:
    notes = Notes()
    number = ended_job(db, JOB, notes)
    assert jobs.get(db, number).state == "succeeded"
    assert notes.texts == ["tracking: MLFLOW_TRACKING_URI is not set where the job runs; nothing is tracked"]


def test_without_the_package_the_job_says_so_and_goes_on(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.URI, "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    notes = Notes()
    number = ended_job(db, JOB, notes)
    assert jobs.get(db, number).state == "succeeded"
    assert notes.texts == ["tracking: MLflow is not installed; pip install 'skipplan[mlflow]'"]


def test_an_error_of_the_job_stays_the_job_s(db: Database, quiet: None) -> None:
    jobs.submit(db, JOB, "hash")
    job = leases.claim(db, "me", 600)
    assert job is not None
    with pytest.raises(ValueError, match="the job's own"), tracking.tracked(db, job, Progress(Notes())):
        raise ValueError("the job's own")


def test_a_tracker_that_hangs_is_left_alone(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "begin", lambda *_: time.sleep(3))
    monkeypatch.setattr(tracking, "finish", lambda *_: time.sleep(3))
    notes = Notes()
    began = time.monotonic()
    number = ended_job(db, JOB, notes)
    assert time.monotonic() - began < 2
    assert notes.texts == [f"tracking: the run of job {number} was not written within 0.2 s"]


def test_a_job_has_one_time_in_all_and_its_run_is_written_by_one(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[int] = []
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "begin", lambda *_: time.sleep(3))
    monkeypatch.setattr(tracking, "finish", lambda _, number: finished.append(number))
    ended_job(db, JOB, Notes())
    assert finished == []
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.5)
    monkeypatch.setattr(tracking, "begin", lambda *_: time.sleep(1))
    monkeypatch.setattr(tracking, "finish", lambda *_: time.sleep(5))
    began = time.monotonic()
    ended_job(db, JOB, Notes())
    assert time.monotonic() - began < 2.3


def test_jobs_of_databases_with_the_same_relative_url_have_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with Database.open("sqlite:///skipplan.db") as db:
            jobs.submit(db, JOB, "hash")
            job = leases.claim(db, "me", 600)
            assert job is not None
            tags.append(tracking._tags(db, job))
            leases.identify(db, job, "hash with the model")
            assert tracking._tags(db, jobs.get(db, job.id)) == tags[-1]
    assert tags[0] != tags[1]


def test_parameters_have_the_job_file_s_names() -> None:
    fields = tracking._flat({"search": {"trials": 4, "rungs": [1, 2]}, "mode": "x", "thresholds": {}, "a b": None})
    assert fields == {"search.trials": "4", "search.rungs": "[1, 2]", "mode": "x", "thresholds": "{}", "a b": "null"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = os.environ.get("SKIPPLAN_MLFLOW_PYTHON")
    if python is None or importlib.util.find_spec("mlflow") is None:
        pytest.skip("SKIPPLAN_MLFLOW_PYTHON names no environment with MLflow, or its client is not here")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()


@pytest.mark.slow
class TestWithAServer:
    @pytest.fixture
    def client(self, server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        from mlflow import MlflowClient

        monkeypatch.setenv(tracking.URI, server)
        return MlflowClient(tracking_uri=server, registry_uri=server)

    @pytest.fixture
    def own(self, tmp_path: Path) -> Iterator[Database]:
        with Database.open(f"sqlite:///{tmp_path / 'own.db'}") as db:
            yield db

    def run_of(self, client: Any, db: Database, number: int) -> Any:
        experiment = client.get_experiment_by_name("skipplan")
        found = [
            run
            for run in client.search_runs([experiment.experiment_id])
            if (run.data.tags["skipplan.job"], run.data.tags["skipplan.database"]) == (str(number), db.safe_url)
        ]
        assert len(found) == 1
        return found[0]

    def test_a_finished_job_is_there_with_its_figures(self, client: Any, own: Database, tmp_path: Path) -> None:
        spec = {key: value for key, value in SPEC.items() if key != "search"} | {"tracking": "mlflow"}
        number = finished_job(own, **spec, search={"trials": 12, "seed": 7})
        tracking.begin(own, number)
        tracking.finish(own, number)
        tracking.finish(own, number)  # again, as after an interruption: the same run, and one version
        run = self.run_of(client, own, number)
        assert run.info.status == "FINISHED"
        assert run.data.params["search.seed"] == "7" and run.data.params["task"] == "shapes"
        best = next(plan for plan in plans.for_job(own, number) if plan.speedup == 1.523)
        for name in ("accuracy", "speedup", "difference_low", "speedup_high", "kv_cache_bytes"):
            assert run.data.metrics[f"best.{name}"] == pytest.approx(getattr(best, name))
        front = client.get_metric_history(run.info.run_id, "plans.speedup")
        assert sorted({each.value for each in front}) == [1.131, 1.523, 1.871]
        searched = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "search.accuracy")}
        stored = [each.accuracy for each in evaluations.summaries(own, number) if each.split == "search"]
        assert searched == {step: value for step, value in enumerate(stored) if value is not None}
        files = {each.path for each in client.list_artifacts(run.info.run_id)}
        assert files == {"report.html", "evaluations.csv", "plans.json", "plan"}
        written = client.download_artifacts(run.info.run_id, "plans.json", str(tmp_path))
        assert {each["id"] for each in json.loads(Path(written).read_text())} == {
            plan.id for plan in plans.for_job(own, number)
        }
        card = client.download_artifacts(run.info.run_id, "plan/README.md", str(tmp_path))
        assert best.plan in Path(card).read_text()
        (version,) = client.search_model_versions("name = 'skipplan-tiny-llava-shapes'")
        assert (version.run_id, version.tags["skipplan.plan"]) == (run.info.run_id, best.plan)

    def test_how_a_job_ended_is_the_run_s_state(self, client: Any, own: Database) -> None:
        notes = Notes()
        number = ended_job(own, JOB, notes, fail="the model cannot be loaded")
        assert notes.texts == []
        run = self.run_of(client, own, number)
        assert (run.info.status, run.data.tags["mlflow.note.content"]) == ("FAILED", "the model cannot be loaded")
        assert run.data.params["search.trials"] == "4"

    def test_a_server_that_went_away_fails_no_job(self, own: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(tracking.URI, "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        notes = Notes()
        number = ended_job(own, JOB, notes)
        assert jobs.get(own, number).state == "succeeded"
        assert notes.texts and all(text.startswith("tracking: ") for text in notes.texts)
