"""Children of a supervisor that end in order, suddenly, and on request; real processes, without Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PROJECT, command_line, descendants

from optimizer.errors import UsageFault
from optimizer.service import runner
from optimizer.service.apart import _read_error, _written_error
from optimizer.service.supervisor import Ended, Supervisor
from optimizer.stages.failed_samples import TooManyFailed
from storage.database import Database
from storage.errors import NotFound
from storage.queue import events, jobs, leases
from workers.errors import ClusterAway, ClusterError, ClusterLost

SUPERVISE = """\
import sys
from optimizer.service.supervisor import Supervisor
raise SystemExit(Supervisor([sys.executable, "-c", sys.argv[1]], restarts=sys.argv[2] == "serve").run())
"""

CHILD = """\
import os, signal, sys, time
from pathlib import Path
from optimizer.service import channel
assert channel.open_channel()
channel.tell(log_format="json")
"""

HOLDING = (
    CHILD
    + """\
from storage.database import Database
from storage.queue import leases
db = Database.open("sqlite:///skipplan.db")
job = leases.claim(db, f"me:{os.getpid()}", 600, 1)
channel.tell_held(db, job, resumable=RESUMABLE)
"""
)


@pytest.fixture
def db(sqlite_url: str):
    with Database.open(sqlite_url) as database:
        yield database


def start(child: str, directory: Path, kind: str = "run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, child, kind],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(child: str, directory: Path, kind: str = "run") -> tuple[int, str, str]:
    process = start(child, directory, kind)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("code", [0, 1])
def test_an_orderly_end_is_the_commands_own(code, tmp_path):
    child = CHILD + f"print('out'); print('err', file=sys.stderr); channel.tell(orderly=True); sys.exit({code})"
    assert ended(child, tmp_path) == (code, "out\n", "err\n")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "Ray ended the process (exit code 1)"), (-9, "was killed (SIGKILL)"), (-11, "crashed (SIGSEGV)")],
)
def test_every_sudden_end_has_its_reason(code, reason):
    assert reason in Ended(code, {}).reason and not Ended(code, {}).orderly


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os._exit(0)", "Ray ended the process (exit code 0)"),  # not taken for success
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed (SIGKILL)"),
    ],
)
def test_a_sudden_end_puts_the_job_back_at_once_without_counting_the_attempt(end, reason, db, tmp_path):
    jobs.submit(db, {}, "hash", max_attempts=1)
    code, output, errors = ended(HOLDING.replace("RESUMABLE", "True") + end, tmp_path)
    assert (code, output) == (4, "")
    assert len(errors.splitlines()) == 1 and reason in errors
    assert "job 1 is back in the queue and goes on where it was" in errors
    job = jobs.get(db, 1)
    assert (job.state, job.owner, job.attempt, job.attempt_limit) == ("queued", None, 1, 2)
    assert events.for_job(db, 1)[-1].kind == "cluster_lost"


def test_a_sudden_end_fails_a_job_that_only_its_command_can_do(db, tmp_path):
    jobs.submit(db, {}, "hash")
    code, _, errors = ended(HOLDING.replace("RESUMABLE", "False") + "os._exit(1)", tmp_path)
    assert code == 4 and "run the command again" in errors
    job = jobs.get(db, 1)
    assert job.state == "failed" and "Ray ended the process" in job.error


def test_a_job_that_somebody_else_has_taken_is_left_alone(db, tmp_path):
    jobs.submit(db, {}, "hash")
    taken = "leases.release(db, job); leases.claim(db, 'another', 600, 1); os._exit(1)"
    code, _, errors = ended(HOLDING.replace("RESUMABLE", "True") + taken, tmp_path)
    assert code == 4 and "job 1 is running" in errors
    assert (jobs.get(db, 1).state, jobs.get(db, 1).owner) == ("running", "another")


def test_a_service_is_started_again_until_it_ends_in_order(db, tmp_path):
    jobs.submit(db, {}, "hash", max_attempts=1)
    again = "if job.attempt < 2: os._exit(1)\nleases.finish(db, job); channel.tell(orderly=True)"
    code, _, errors = ended(HOLDING.replace("RESUMABLE", "True") + again, tmp_path, "serve")
    assert code == 0, errors
    assert jobs.get(db, 1).state == "succeeded" and jobs.get(db, 1).attempt == 2
    assert [line.split('"event": "')[1].split('"')[0] for line in errors.splitlines()] == [
        "process_lost",
        "job_put_back",
        "resting",
    ]


def test_lines_of_rays_core_are_left_out_and_others_are_not(tmp_path):
    child = CHILD + (
        "os.write(2, b'[2026-01-02 03:04:05,678 E 1 22] rpc_client.h:204: Failed to connect to GCS\\n')\n"
        "os.write(2, b'a library warns\\n'); channel.tell(orderly=True)"
    )
    assert ended(child, tmp_path) == (0, "", "a library warns\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_child(number, tmp_path):
    child = CHILD + (
        "def stop(number, frame): channel.tell(orderly=True); sys.exit(130)\n"
        f"signal.signal({int(number)}, stop); print('ready', flush=True); time.sleep(60)"
    )
    process = start(child, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 130


def test_a_child_that_dies_of_the_signal_leaves_its_job_released(db, tmp_path):
    jobs.submit(db, {}, "hash", max_attempts=1)
    process = start(HOLDING.replace("RESUMABLE", "True") + "print('ready', flush=True); time.sleep(60)", tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.startswith("skipplan: interrupted; job 1 is back in the queue")
    assert (jobs.get(db, 1).state, jobs.get(db, 1).attempt_limit) == ("queued", 2)


def test_a_killed_supervisor_takes_its_child_along(tmp_path):
    process = start(CHILD + "print('ready', flush=True); time.sleep(60)", tmp_path)
    assert process.stdout.readline() == "ready\n"
    (child,) = descendants(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while command_line(child):
        assert time.monotonic() < deadline, "the child goes on alone"
        time.sleep(0.05)


def test_a_caller_in_python_gets_one_exception_each_time_and_the_job_fails_in_the_end(db, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    jobs.submit(db, {}, "hash", max_attempts=1)
    child = Supervisor([sys.executable, "-c", HOLDING.replace("RESUMABLE", "True") + "os._exit(1)"])
    for number in range(1, runner.MOST_LOSSES + 1):
        with pytest.raises(ClusterLost, match=r"Ray ended the process \(exit code 1\).*; job 1 is ") as raised:
            child.run_once()
        now = jobs.get(db, 1)
        last = number == runner.MOST_LOSSES
        assert (now.state, now.owner, now.attempt) == ("failed" if last else "queued", None, number)
        assert ("job 1 is back in the queue" in str(raised.value)) is not last
    assert str(raised.value).endswith("5 times in a row, with nothing recorded in between)")


def test_a_caller_in_python_gets_what_the_child_told(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    child = CHILD + "channel.tell(job=int(sys.stdin.read()), orderly=True)"
    assert Supervisor([sys.executable, "-c", child], given="7").run_once()["job"] == 7


def test_errors_of_the_child_are_raised_as_they_were():
    for error in (
        UsageFault("task x: 3 of it", ["sample 1: a", "sample 2: b"]),
        TooManyFailed("2 of 8", ["sample 1: a"]),
        ClusterAway("nothing answers"),
        NotFound("there is no job 9"),
    ):
        again = _read_error(json.loads(json.dumps(_written_error(error))))
        assert (type(again), str(again)) == (type(error), str(error))
        assert getattr(again, "details", ()) == getattr(error, "details", ())
    defect = _read_error(_written_error(ZeroDivisionError("division by zero")))
    assert type(defect) is RuntimeError and "ZeroDivisionError: division by zero" in str(defect)


def test_a_job_under_which_ray_dies_each_time_fails_in_the_end(db):
    jobs.submit(db, {}, "hash", max_attempts=1)
    for number in range(1, runner.MOST_LOSSES + 1):
        job = leases.claim(db, "me", 60, 1)
        assert job.attempt == number
        runner.put_back(db, job, ClusterLost("its head node does not answer any more"))
    now = jobs.get(db, 1)
    assert now.state == "failed"
    assert now.error == "its head node does not answer any more (5 times in a row, with nothing recorded in between)"


def test_a_cluster_that_is_away_counts_only_where_the_job_may_have_named_a_wrong_one(db, monkeypatch):
    monkeypatch.delenv("SKIPPLAN_CLUSTER_ADDRESS", raising=False)
    jobs.submit(db, {}, "hash", max_attempts=2)
    runner.put_back(db, leases.claim(db, "me", 60, 1), ClusterAway("nothing answers"))
    assert jobs.get(db, 1).attempt_limit == 2
    monkeypatch.setenv("SKIPPLAN_CLUSTER_ADDRESS", "192.0.2.1:6379")
    for _ in range(40):  # more than a job that names its cluster is given
        runner.put_back(db, leases.claim(db, "me", 60, 1), ClusterAway("nothing answers"))
        assert jobs.get(db, 1).state == "queued"
    monkeypatch.delenv("SKIPPLAN_CLUSTER_ADDRESS")
    runner.put_back(db, leases.claim(db, "me", 60, 1), ClusterError("needs 9 CPUs, the cluster has 2"))
    assert jobs.get(db, 1).state == "failed"  # the second that counts
