"""Random sequences of queue operations, each compared with a queue of a few lines that is plainly right."""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import InvalidTransition, LeaseLost
from storage.queue import jobs, leases


@dataclass
class Entry:
    """What the plain queue knows of a job."""

    priority: int
    limit: int
    state: str = "queued"
    attempt: int = 0
    expired: bool = False


class PlainQueue:
    """The queue as its documentation tells it."""

    def __init__(self):
        self.entries = {}

    def claim(self, expired):
        for entry in self.entries.values():
            if entry.state == "running" and entry.expired:
                entry.state = "queued" if entry.attempt < entry.limit else "failed"
        waiting = [(-entry.priority, job_id) for job_id, entry in self.entries.items() if entry.state == "queued"]
        if not waiting:
            return None
        job_id = min(waiting)[1]
        entry = self.entries[job_id]
        entry.state, entry.attempt, entry.expired = "running", entry.attempt + 1, expired
        return job_id

    def may_write(self, job):
        entry = self.entries[job.id]
        return entry.state == "running" and entry.attempt == job.attempt


numbers = st.integers(0, 30)
operations = st.one_of(
    st.tuples(st.just("submit"), st.integers(-1, 1)),
    st.tuples(st.just("claim"), st.booleans()),
    st.tuples(st.sampled_from(["heartbeat", "succeeded", "failed", "infeasible", "release"]), numbers),
    st.tuples(st.sampled_from(["cancel", "resume"]), numbers),
)


def write(db, plain, kind, job):
    """Do what only the holder of a job may do; say nothing else happened if it is not the holder."""
    entry = plain.entries[job.id]
    ends = {"succeeded": leases.finish, "failed": leases.fail, "infeasible": leases.infeasible}
    reason = () if kind == "succeeded" else ("reason",)
    if kind in ends and entry.state == kind and entry.attempt == job.attempt:
        assert ends[kind](db, job, *reason).state == kind
        return
    calls = {
        "heartbeat": lambda: leases.heartbeat(db, job, 60),
        "release": lambda: leases.release(db, job),
        **{state: lambda state=state: ends[state](db, job, *reason) for state in ends},
    }
    if not plain.may_write(job):
        with pytest.raises(LeaseLost):
            calls[kind]()
        return
    calls[kind]()
    if kind == "heartbeat":
        entry.expired = False
    elif kind == "release":
        entry.state, entry.limit = "queued", entry.limit + 1
    else:
        entry.state = kind


def user(db, plain, kind, job_id):
    """Do what a user may do; the database must refuse just what the plain queue refuses."""
    entry = plain.entries[job_id]
    allowed = {"cancel": ("queued", "running", "cancelled"), "resume": ("failed", "cancelled")}[kind]
    if entry.state not in allowed:
        with pytest.raises(InvalidTransition):
            getattr(jobs, kind)(db, job_id)
        return
    getattr(jobs, kind)(db, job_id)
    if kind == "resume":
        entry.state, entry.limit = "queued", entry.attempt + jobs.MAX_ATTEMPTS
    else:
        entry.state = "cancelled"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operations, min_size=5, max_size=30))
def test_queue_does_what_a_plain_one_does(db, sequence):
    for job in jobs.list_jobs(db, limit=None):
        if job.state == "running":
            jobs.cancel(db, job.id)
        jobs.remove(db, job.id)
    plain, claims = PlainQueue(), []
    for kind, value in sequence:
        if kind == "submit":
            job = jobs.submit(db, {}, "h", priority=value, max_attempts=2)
            plain.entries[job.id] = Entry(value, 2)
        elif kind == "claim":
            job = leases.claim(db, f"owner-{len(claims)}", -1 if value else 60)
            assert (job.id if job else None) == plain.claim(value)
            claims += [job] if job else []
        elif kind in ("cancel", "resume") and plain.entries:
            user(db, plain, kind, list(plain.entries)[value % len(plain.entries)])
        elif claims and kind not in ("cancel", "resume"):
            write(db, plain, kind, claims[value % len(claims)])
        now = {job.id: (job.state, job.attempt, job.attempt_limit) for job in jobs.list_jobs(db, limit=None)}
        assert now == {job_id: (each.state, each.attempt, each.limit) for job_id, each in plain.entries.items()}
