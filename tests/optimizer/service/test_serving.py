"""A serving process: what it says, what it keeps between jobs, and how it meets trouble around it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PROJECT, Serving, command_line, submit, tiny_job, wait_until_done

from storage.database import Database
from storage.queue import events, jobs, stages

PASSWORD = "hidden-from-everybody"


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two jobs of one model and different tasks at the same time, and one that cannot be done, in one process."""
    directory = tmp_path_factory.mktemp("served")
    url = f"sqlite:///{directory / 'skipplan.db'}"
    with Database.open(url) as db:
        good = [submit(db, tiny_job(tiny_model, number, workers=1)).id for number in (0, 2)]
        spec = tiny_job(tiny_model, 4, workers=1)
        bad = submit(db, spec.model_copy(update={"protect": (99,)})).id
        serving = Serving.start(url, directory / "log", "--jobs", "2")
        wait_until_done(db, [*good, bad], [serving], 600)
        workers = serving.workers()
        environments = [Path(f"/proc/{worker}/environ").read_bytes() for worker in workers]
        code = serving.stop()
        yield {
            "db": db,
            "good": good,
            "bad": bad,
            "code": code,
            "environments": environments,
            "lines": [json.loads(line) for line in serving.log.read_text().splitlines() if line.startswith("{")],
            "log": serving.log.read_text(),
        }


def test_jobs_are_run_and_a_bad_one_does_not_end_the_service(served):
    db = served["db"]
    for number in served["good"]:
        assert jobs.get(db, number).state in ("succeeded", "infeasible")
        assert {"evaluations", "layer_executions", "samples"} <= stages.counters(db, number).keys()
    failed = jobs.get(db, served["bad"])
    assert failed.state == "failed" and "layer 99" in failed.error
    assert served["code"] == 130


def test_every_event_is_one_line_that_names_its_job(served):
    happened = [(line.get("job"), line["event"]) for line in served["lines"]]
    first, second = served["good"]
    for number in (first, second):
        assert (number, "job_claimed") in happened
        assert {(number, "job_succeeded"), (number, "job_infeasible")} & set(happened)
    assert (served["bad"], "job_failed") in happened
    assert happened[0] == (None, "serving") and happened[-1] == (None, "stopped_serving")
    assert all(line["time"].endswith("+00:00") for line in served["lines"])
    *events, farewell = served["log"].splitlines()
    assert len(served["lines"]) == len(events)  # nothing else is written, but why the command ended
    assert farewell == "skipplan: stopped after 3 jobs"


def test_jobs_of_one_model_share_its_workers_at_the_same_time(served):
    happened = [(line["event"], line.get("job")) for line in served["lines"]]
    assert [event for event, _ in happened].count("worker_ready") == 1
    ends = [happened.index(each) for each in happened if each[0] in ("job_succeeded", "job_infeasible")]
    assert len(ends) == 2
    assert all(happened.index(("job_claimed", number)) < min(ends) for number in served["good"])


def test_workers_do_not_know_the_database(served):
    assert len(served["environments"]) == 1
    assert all(b"SKIPPLAN_DATABASE" not in environment for environment in served["environments"])


@pytest.mark.postgres
def test_passwords_stay_out_of_logs_and_arguments(postgresql_admin_url: str, tmp_path: Path):
    url = postgresql_admin_url.replace("127.0.0.1", "localhost").rsplit("/", 1)[0] + "/no_such_database"
    secret = url.split(":")[2].split("@")[0]
    refused = subprocess.run(
        [sys.executable, "-m", "optimizer.cli.main", "--database", url, "serve", "--log-format", "json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 4 and secret not in refused.stderr + refused.stdout
    assert "no_such_database" in refused.stderr


def test_a_password_on_the_command_line_is_not_left_in_the_process_list(tmp_path: Path):
    with socket.socket() as silent:  # takes connections and says nothing, so that the command waits
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"postgresql://me:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/db?connect_timeout=60"
        process = subprocess.Popen(
            [sys.executable, "-m", "optimizer.cli.main", "jobs", "list", "--database", url],
            cwd=tmp_path,
            env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            silent.settimeout(60)
            connection, _ = silent.accept()  # the command is connecting, and waits for an answer
            assert command_line(process.pid).split(b"\0")[1:5] == [b"-m", b"optimizer.cli.main", b"jobs", b"list"]
            assert PASSWORD.encode() not in command_line(process.pid)
            connection.close()
        finally:
            process.kill()
            process.wait()


def test_a_job_whose_cluster_is_away_waits_and_is_given_up_in_the_end(tiny_model: Path, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'skipplan.db'}"
    with Database.open(url) as db:
        spec = tiny_job(tiny_model, 0, address="127.0.0.1:9").model_copy(update={"attempts": 2})
        number = submit(db, spec).id
        serving = Serving.start(url, tmp_path / "log", "--once")
        assert serving.process.wait(300) == 0
        job = jobs.get(db, number)
        assert job.state == "failed" and "nothing answers" in job.error and job.attempt == 2
        history = [event.kind for event in events.for_job(db, number)]
        assert history == ["submitted", "claimed", "retry", "claimed", "failed"]
        assert "job_put_back" in serving.log.read_text()
