"""What becomes of a job however its process ends, and who may take it over."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from optimizer.errors import Interrupted, LeaseLost, UsageFault
from optimizer.service import runner
from optimizer.stages import pipeline
from optimizer.stages.context import JobFailed
from optimizer.stages.progress import Progress
from optimizer.stages.publish import Published
from storage.database import Database
from storage.errors import UnreachableDatabase
from storage.queue import jobs, leases
from workers.errors import ClusterError

SPEC = {"model": {"path": "llava-12"}, "task": "easy-vqa"}


@dataclass(frozen=True)
class Inputs:
    fingerprint: str = ""

    @property
    def spec_hash(self) -> str:
        return f"hash with model {self.fingerprint}"


@pytest.fixture
def db(sqlite_url: str):
    with Database.open(sqlite_url) as database:
        yield database


def claimed(db: Database) -> jobs.Job:
    return runner.claim_this(db, jobs.submit(db, SPEC, "hash"), runner.new_owner())


def run(db: Database, job: jobs.Job, monkeypatch: pytest.MonkeyPatch, outcome: object) -> Published:
    """Process a job whose pipeline ends as given; everything around the pipeline is real."""

    def end(context):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(pipeline, "run", end)
    return runner.process(db, job, Progress(), lambda still_held: (Inputs(), SimpleNamespace(fingerprint="f")))  # type: ignore


@pytest.mark.parametrize(
    ("outcome", "raised", "state", "reason"),
    [
        (Published((1,), 1, ""), None, "succeeded", None),
        (Published((1,), None, "too slow"), None, "infeasible", "too slow"),
        (KeyboardInterrupt(), Interrupted, "queued", None),
        (ClusterError("node lost"), ClusterError, "queued", None),
        (UnreachableDatabase("gone"), UnreachableDatabase, "queued", None),
        (JobFailed("dense cannot be evaluated"), JobFailed, "failed", "dense cannot be evaluated"),
        (ZeroDivisionError("oops"), ZeroDivisionError, "failed", "ZeroDivisionError: oops"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end_leaves_the_right_state(db, monkeypatch, outcome, raised, state, reason):
    job = claimed(db)
    if raised is None:
        assert run(db, job, monkeypatch, outcome) == outcome
    else:
        with pytest.raises(raised):
            run(db, job, monkeypatch, outcome)
    now = jobs.get(db, job.id)
    assert (now.state, now.error) == (state, reason)
    assert now.owner is None
    assert now.spec_hash == "hash with model f"  # found again by what it was run with


def test_who_lost_the_lease_writes_nothing_more(db, monkeypatch):
    job = claimed(db)
    leases.release(db, job)
    other = leases.claim(db, "another", 60)
    with pytest.raises(LeaseLost, match="no longer held"):
        run(db, job, monkeypatch, Published((), None, "nothing"))
    assert jobs.get(db, job.id).owner == other.owner == "another"


def test_a_running_job_is_refused_while_its_owner_shows_signs_of_life(db, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    job = jobs.submit(db, SPEC, "hash")
    alive = leases.claim(db, "alive", 60, job.id)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            leases.heartbeat(db, alive, 60)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageFault, match="is being run by alive"):
            runner.claim_this(db, alive, "me")
    finally:
        stop.set()
        thread.join()


def test_a_dead_owners_job_is_taken_over_when_its_lease_ends(db, monkeypatch):
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    job = jobs.submit(db, SPEC, "hash")
    dead = leases.claim(db, "dead", 0.5, job.id)
    told = []
    taken = runner.claim_this(db, dead, "me", told.append)
    assert (taken.owner, taken.attempt) == ("me", 2)
    assert len(told) == 1 and "dead" in told[0]


def test_heartbeat_extends_the_lease_and_stores_progress(db, monkeypatch):
    monkeypatch.setattr(runner, "HEARTBEATS_PER_LEASE", 600)
    job = claimed(db)
    progress = Progress()
    progress.begin("search", 10)
    progress.advance(3, "RRS")
    with runner.heartbeat(db, job, progress):
        deadline = time.monotonic() + 10
        while not jobs.get(db, job.id).progress and time.monotonic() < deadline:
            time.sleep(0.02)
    now = jobs.get(db, job.id)
    assert now.progress == {"stage": "search", "done": 3, "total": 10, "news": "RRS"}
    assert now.lease_expires_at > job.lease_expires_at


def test_owners_are_unique():
    assert runner.new_owner() != runner.new_owner()
