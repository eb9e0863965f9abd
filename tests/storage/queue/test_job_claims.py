"""Many claimants, killed owners, broken connections: each job is run by exactly one, nothing is half-written."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event, text
from storage_builders import claimed, figures, record, scene

from storage import schema
from storage.database import Database
from storage.errors import LeaseLost, UnreachableDatabase
from storage.queue import events, jobs, leases, stages
from storage.records import evaluations, plans

ROOT = Path(schema.__file__).parents[1]
HERE = Path(__file__).parents[2] / "helpers"


def process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"},
        stdout=subprocess.PIPE,
        text=True,
    )


SERVE = """
import json, os, sys, time
from storage.queue import jobs, leases
from storage.database import Database

url, owner = sys.argv[1:]
done = []
with Database.open(url) as db:
    print("ready", flush=True)
    sys.stdin.readline()
    while (job := leases.claim(db, owner, 30)) is not None:
        leases.heartbeat(db, job, 30, {"at": 1})
        time.sleep(0.05)  # so that one process cannot end all jobs before the others have woken
        leases.finish(db, job)
        done.append(job.id)
print(json.dumps(done))
"""


def test_four_processes_share_the_queue(database_url):
    with Database.open(database_url) as db:
        submitted = [jobs.submit(db, {"n": n}, str(n)).id for n in range(32)]
        serving = [
            subprocess.Popen(
                [sys.executable, "-c", SERVE, database_url, f"serve-{n}"],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for n in range(4)
        ]
        for each in serving:
            assert each.stdout.readline() == "ready\n"
        answers = [_go(each) for each in serving]
        done = [json.loads(each.communicate(timeout=60)[0]) for each in answers]
        assert sorted(job for mine in done for job in mine) == submitted
        assert sum(bool(mine) for mine in done) > 1, "more than one of them had work"
        for job in jobs.list_jobs(db):
            assert (job.state, job.attempt) == ("succeeded", 1)
            assert [each.kind for each in events.for_job(db, job.id)] == ["submitted", "claimed", "succeeded"]


def _go(serving):
    serving.stdin.write("go\n")
    serving.stdin.flush()
    return serving


def test_threads_claim_each_job_once(db):
    submitted = [jobs.submit(db, {}, str(n)).id for n in range(40)]
    together = threading.Barrier(8)

    def serve(number):
        mine = []
        together.wait()
        while (job := leases.claim(db, f"thread-{number}", 60)) is not None:
            mine.append((job.id, job.attempt))
        return mine

    with ThreadPoolExecutor(8) as threads:
        got = [claim for mine in threads.map(serve, range(8)) for claim in mine]
    assert sorted(got) == [(job, 1) for job in submitted]


def test_expired_job_goes_to_one_of_many(db):
    claimed(db, "dead", lease_seconds=-1)
    together = threading.Barrier(8)

    def claim(number):
        together.wait()
        return leases.claim(db, f"thread-{number}", 60)

    with ThreadPoolExecutor(8) as threads:
        got = [job for job in threads.map(claim, range(8)) if job is not None]
    assert [job.attempt for job in got] == [2]
    counts = Counter(each.kind for each in events.for_job(db, got[0].id))
    assert counts == {"submitted": 1, "claimed": 2, "lease_expired": 1}


def test_lease_is_judged_by_the_database_clock(db, monkeypatch):
    """A claimant whose own clock is hours ahead must not take a running job away."""
    job = claimed(db, "me", 60)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert leases.claim(db, "hasty", 60) is None
    assert jobs.get(db, job.id).owner == "me"


def test_lease_runs_out_by_itself(db):
    job = claimed(db, "me", 0.2)
    assert leases.claim(db, "other", 60) is None
    time.sleep(0.3)
    assert leases.claim(db, "other", 60).id == job.id


def test_same_spec_submitted_at_once_is_queued_once(db):
    together = threading.Barrier(8)

    def submit(_):
        together.wait()
        return jobs.submit_once(db, {}, "one hash")

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(submit, range(8)))
    assert sum(queued for _, queued in answers) == 1
    assert len({job.id for job, _ in answers}) == 1 == len(jobs.list_jobs(db))


def test_counters_of_many_threads_lose_nothing(db):
    job = claimed(db)

    def count(_):
        stages.add_counters(db, job, {"evaluations": 1, "retries": 2})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(40)))
    assert stages.counters(db, job.id) == {"evaluations": 40.0, "retries": 80.0}


WRITE_AND_DIE = """
import os, signal, sys
from sqlalchemy import event
from storage.queue import jobs, leases, stages
from storage.records import plans
from storage.database import Database
from storage_builders import figures, scene

db = Database.open(sys.argv[1])
stage = scene(db, "doomed")
print(stage.job.id, flush=True)

@event.listens_for(db.engine, "commit")
def die(_):
    os.kill(os.getpid(), signal.SIGKILL)

with db.transaction() as session:
    plans.publish(session, stage.job, figures=[figures("RRSS"), figures("RSSS")], group=stage.group)
    stages.record_stage(session, stage.job, "publish", {"plans": 2})
    leases.finish(session, stage.job)
"""


def test_process_killed_before_it_commits_leaves_nothing(db, database_url):
    doomed = process(WRITE_AND_DIE, database_url)
    job_id = int(doomed.communicate(timeout=60)[0])
    assert doomed.returncode == -signal.SIGKILL
    assert plans.list_plans(db) == []
    assert stages.stages(db, job_id) == {}
    left = jobs.get(db, job_id)
    assert (left.state, left.owner) == ("running", "doomed")
    with db.transaction() as session:
        session.execute(text("UPDATE jobs SET lease_expires_at = created_at"))
    assert leases.claim(db, "successor", 60).attempt == 2


RECORD_UNTIL_KILLED = """
import sys
from storage.queue import jobs, leases
from storage.records import evaluations
from storage.records.evaluations import EvaluationKey, EvaluationResult
from storage.database import Database

url, job_id, model_id, task_id = sys.argv[1], *map(int, sys.argv[2:])
db = Database.open(url)
job = leases.claim(db, f"driver-{sys.argv[0]}", 0.5, job_id)
assert job is not None
done = {each.n_samples for each in evaluations.for_job(db, job_id)}
for n in range(1, 10**6):
    if n not in done:
        key = EvaluationKey(
            model_id=model_id, task_id=task_id, plan="RRSS", split="search", split_hash="s", n_samples=n
        )
        evaluations.record(db, job, key, EvaluationResult(scores=[1] * n))
        print(n, flush=True)
"""


def test_driver_killed_again_and_again_evaluates_nothing_twice(db, database_url):
    stage = scene(db, "first")
    leases.release(db, stage.job)
    reported = []
    for kill_after in (3, 9, 1):
        driver = process(RECORD_UNTIL_KILLED, database_url, stage.job.id, stage.model_id, stage.task_id)
        for _ in range(kill_after):
            reported.append(int(driver.stdout.readline()))
        driver.kill()
        reported += [int(line) for line in driver.communicate()[0].split()]
        time.sleep(0.6)  # its lease
    recorded = [each.n_samples for each in evaluations.for_job(db, stage.job.id)]
    assert recorded == list(range(1, 1 + len(recorded))), "each once, none left out"
    assert len(set(reported)) == len(reported), "no successor evaluated what was recorded"
    assert set(reported) <= set(recorded), "what was reported as recorded is there"
    assert len(recorded) - len(reported) <= 3, "at most the report of the last one is lost with each kill"


def _break_connections(db):
    """End all connections of this database, as a restart of the server does."""
    with db.engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_connection_broken_inside_a_transaction_is_tried_again(db, database_url):
    stage = scene(db)
    calls = []
    with Database.open(database_url) as other:

        @event.listens_for(db.engine, "before_cursor_execute")
        def interrupt(connection, cursor, statement, *rest):
            if statement.startswith("INSERT INTO evaluations") and not calls:
                calls.append(statement)
                _break_connections(other)

        record(db, stage.job, plan="RRSS", scores=[1], **stage.samples)
    assert len(calls) == 1
    assert len(evaluations.for_job(db, stage.job.id)) == 1


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_broken_transaction_of_the_caller_writes_nothing(db, database_url):
    stage = scene(db)
    with Database.open(database_url) as other, pytest.raises(UnreachableDatabase), db.transaction() as session:
        stages.record_stage(session, stage.job, "publish", {})
        _break_connections(other)
        plans.publish(session, stage.job, figures=[figures("RRSS")], group=stage.group)
    assert stages.stages(db, stage.job.id) == {}
    assert plans.list_plans(db) == []


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_server_restart_is_waited_for(db, database_url, postgresql_server):
    if f":{postgresql_server.port}/" not in database_url:
        pytest.skip("the server in SKIPPLAN_TEST_POSTGRES_URL is not ours to halt")
    job = claimed(db, "me", 60)
    with ThreadPoolExecutor(1) as thread:
        postgresql_server.halt()
        waiting = thread.submit(leases.heartbeat, db, job, 60, {"evaluated": 5})
        time.sleep(0.3)
        assert not waiting.done()
        postgresql_server.start()  # here and not in the thread, with whose end the server would go
        waiting.result(timeout=30)
    assert jobs.get(db, job.id).progress == {"evaluated": 5}


@pytest.mark.postgres
def test_server_that_stays_away_is_reported(postgresql_server):
    with Database.open(postgresql_server.url(), check_schema=False, retry_seconds=0.3) as db:
        postgresql_server.halt()
        try:
            with pytest.raises(UnreachableDatabase, match="cannot reach postgresql://tester"):
                jobs.get(db, 1)
        finally:
            postgresql_server.start()


def test_sqlite_writer_waits_for_another(tmp_path):
    """A reader that then writes would fail at once if the write lock were not taken first."""
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with Database.open(url) as one, Database.open(url) as two:
        job = claimed(one)
        entered, answer = threading.Event(), []

        def late():
            entered.wait()
            answer.append(leases.heartbeat(two, job, 60, {"by": "two"}))

        thread = threading.Thread(target=late)
        thread.start()
        with one.transaction() as session:
            leases.hold(session, job)
            entered.set()
            time.sleep(0.3)
            stages.record_stage(session, job, "profile", {})
        thread.join()
        assert len(answer) == 1
        assert jobs.get(one, job.id).progress == {"by": "two"}


def test_readers_are_not_held_up_by_a_writer(db, database_url):
    job = claimed(db)
    with Database.open(database_url) as reader, db.transaction() as session:
        stages.record_stage(session, job, "profile", {})
        start = time.monotonic()
        assert stages.stages(reader, job.id) == {}
        assert jobs.get(reader, job.id).state == "running"
        assert time.monotonic() - start < 1.0


def test_idle_claim_takes_no_write_lock(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with Database.open(url) as one, Database.open(url) as two, one.transaction():
        assert leases.claim(two, "idle", 60) is None


def test_held_job_cannot_be_claimed_until_the_write_is_through(db, database_url):
    """The proof of ownership and the write it allows are one step."""
    job = claimed(db, "slow", lease_seconds=-1)
    with Database.open(database_url) as other, ThreadPoolExecutor(1) as thread:
        with db.transaction() as session:
            leases.hold(session, job)
            successor = thread.submit(leases.claim, other, "quick", 60)
            time.sleep(0.3)
            stages.record_stage(session, job, "profile", {"by": "slow"})
        taken = successor.result(timeout=30) or leases.claim(other, "quick", 60)
        assert taken.attempt == 2
        assert stages.stages(other, job.id)["profile"].payload == {"by": "slow"}
        with pytest.raises(LeaseLost):
            stages.record_stage(db, job, "redundancy", {})
