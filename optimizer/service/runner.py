"""Run jobs: claim one, keep its lease alive, run its stages, and record how it ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from optimizer.errors import Interrupted, LeaseLost, UsageFault, explain
from optimizer.job.inputs import JobInputs
from optimizer.job.loading import ENVIRONMENT
from optimizer.job.spec import JobSpec
from optimizer.preflight.checks import too_few_to_prove
from optimizer.service import channel, hooks, logs
from optimizer.service.pool import open_pool
from optimizer.service.tracking import tracked
from optimizer.stages import pipeline
from optimizer.stages.context import JobContext
from optimizer.stages.progress import Progress
from optimizer.stages.publish import Published
from storage import errors as storage_errors
from storage.database import Database
from storage.queue import attempts, jobs, leases
from storage.queue.jobs import Job
from workers.errors import ClusterAway, ClusterError, ClusterLost
from workers.text import one_line

if TYPE_CHECKING:
    from workers.cluster.pool import WorkerPool
    from workers.cluster.share import PoolShare

LEASE_SECONDS = 30.0
HEARTBEATS_PER_LEASE = 6
POLL_SECONDS = 1.0
FIRST_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 300.0
"""A job whose cluster failed waits so long, twice as long each time, but no longer than this."""

MOST_LOSSES = 5
"""So often in a row a cluster may end under a job that records nothing; then the job is taken for the cause."""

MOST_OUTAGES = 32
"""So often in a row the cluster that a job file names may be away once the job has run there: about two hours."""


def new_owner() -> str:
    """Name this process as no other process is or was named."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def stored_spec(spec: JobSpec) -> dict[str, Any]:
    """Dump a job's specification for the database, without its URL, which may hold a password."""
    return spec.model_dump(mode="json", exclude={"database"})


def submit(db: Database, inputs: JobInputs, *, anew: bool) -> tuple[Job, bool]:
    """Queue a job; unless ``anew``, one of the same specification that is queued, running or done is found instead."""
    spec, stored, known_by = inputs.spec, stored_spec(inputs.spec), inputs.spec_hash
    if anew:
        return jobs.submit(db, stored, known_by, priority=spec.priority, max_attempts=spec.attempts), True
    return jobs.submit_once(db, stored, known_by, priority=spec.priority, max_attempts=spec.attempts)


def claim_this(db: Database, job: Job, owner: str, note: Callable[[str], None] = lambda text: None) -> Job:
    """Claim a given job, waiting for the lease of an owner that died. Raises UsageFault when somebody is running it."""
    seen = job.lease_expires_at
    noted = False
    while True:
        claimed = leases.claim(db, owner, LEASE_SECONDS, job.id)
        if claimed is not None:
            return claimed
        now = jobs.get(db, job.id)
        if now.is_finished:
            raise UsageFault(f"job {job.id} has meanwhile ended as {now.state}; run the job file again to see it")
        if now.lease_expires_at is not None and seen is not None and now.lease_expires_at > seen:
            raise UsageFault(f"job {job.id} of the same specification is being run by {now.owner}; wait for it")
        seen = now.lease_expires_at
        if not noted:
            note(f"job {job.id} was last run by {now.owner}; waiting for a sign of life or the end of its lease")
            noted = True
        time.sleep(POLL_SECONDS)


def run_job(db: Database, inputs: JobInputs, progress: Progress, *, anew: bool) -> Job:
    """Queue a job and run it in this process; return it as it ended.

    The workers start first: a job that cannot begin leaves no trace in the database. Raises UsageFault when the model
    cannot be loaded or the job is being run elsewhere, and what :func:`process` raises.
    """
    for note in too_few_to_prove(inputs.spec, inputs.task):
        progress.note(f"note: {note}")
    told = hooks.delivering(db) if inputs.spec.notify else nullcontext()
    with told, open_pool(inputs, progress) as pool:
        inputs = replace(inputs, fingerprint=pool.fingerprint)
        queued, _ = submit(db, inputs, anew=anew)
        if queued.is_finished:
            progress.note(f"job {queued.id} had this specification and this model; its result (--force runs it anew)")
            return queued
        job = claim_this(db, queued, new_owner(), progress.note)
        progress.note(f"job {job.id}")
        process(db, job, progress, lambda still_held: (inputs, pool))
    return jobs.get(db, job.id)


def process(
    db: Database,
    job: Job,
    progress: Progress,
    start: Callable[[Callable[[], None]], tuple[JobInputs, WorkerPool | PoolShare]],
    lease_seconds: float = LEASE_SECONDS,
) -> Published:
    """Run a claimed job to its final state; ``start`` gives its inputs and workers while the lease is kept.

    Where ``start`` waits, it calls its argument now and then, which raises LeaseLost once the job is no longer held.
    Raises Interrupted, LeaseLost, ClusterError, DatabaseError, and a Fault or WorkersError for a job that cannot be
    done.
    """
    with logs.of_job(job.id), tracked(db, job, progress):
        with attempt(db, job, progress, lease_seconds) as still_held:
            inputs, pool = start(still_held)
            inputs = replace(inputs, fingerprint=pool.fingerprint)
            leases.identify(db, job, inputs.spec_hash)
            published = pipeline.run(JobContext(db, job, inputs, pool, progress))
        if published.best is None:
            leases.infeasible(db, job, published.reason)
            logs.log("job_infeasible", reason=published.reason)
        else:
            leases.finish(db, job)
            logs.log("job_succeeded", plan=published.best, plans=len(published.plan_ids))
    return published


@contextmanager
def attempt(
    db: Database, job: Job, progress: Progress, lease_seconds: float = LEASE_SECONDS, *, resumable: bool = True
) -> Iterator[Callable[[], None]]:
    """Keep a claimed job's lease while it is worked on, and record why an attempt ended early; yield as heartbeat.

    A resumable job goes back to the queue when it is interrupted. So does one whose cluster or database failed, to be
    taken again after a while; see :func:`put_back`. Raises Interrupted, LeaseLost, and what the work raises.
    """
    channel.tell_held(db, job, resumable=resumable)
    try:
        with heartbeat(db, job, progress, lease_seconds) as still_held, stop_signals():
            yield still_held
    except KeyboardInterrupt:
        quietly(lambda: (leases.release if resumable else leases.fail)(db, job, "interrupted"))
        logs.log("job_interrupted")
        raise Interrupted(
            f"interrupted; job {job.id} is back in the queue and goes on where it was when the job file is run again"
            if resumable
            else "interrupted; what was measured is kept, run the command again to go on"
        ) from None
    except storage_errors.LeaseLost as error:
        logs.log("job_taken_away", reason=one_line(error))
        raise LeaseLost(str(error)) from None
    except BaseException as error:
        known = explain(error)
        reason = f"{type(error).__name__}: {one_line(error)}" if known is None else known[1]
        reason = "; ".join([reason, *getattr(error, "details", ())])
        if resumable and isinstance(error, ClusterError | storage_errors.DatabaseError):
            put_back(db, job, error)
            if isinstance(error, ClusterLost):
                raise type(error)(f"{reason}; {goes_on(db, job)}") from None
        else:
            quietly(lambda: leases.fail(db, job, reason))
            logs.log("job_failed", reason=reason)
        raise


def put_back(db: Database, job: Job, error: BaseException) -> None:
    """Queue a job again after its cluster or database failed, with a pause that doubles from failure to failure.

    The attempt counts unless it recorded something, but not where a running cluster ended under the job, or an address
    does not answer that need not be the job's mistake: that is limited by how often it happens in a row.
    """
    reason = one_line(error)
    with suppress(storage_errors.StorageError):  # what made the attempt end is what is reported
        before = attempts.retries_in_a_row(db, job.id)
        wait = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**before)
        if isinstance(error, ClusterLost):
            now = leases.put_off(db, job, "cluster_lost", reason, wait, MOST_LOSSES)
        elif isinstance(error, ClusterAway) and cluster_is_ours():
            now = leases.put_off(db, job, "cluster_away", reason, wait, sys.maxsize)
        elif isinstance(error, ClusterAway) and attempts.got_somewhere(db, job.id):
            now = leases.put_off(db, job, "cluster_away", reason, wait, MOST_OUTAGES)
        else:
            now = leases.retry(db, job, reason, wait)
        logs.log("job_put_back" if now.state == "queued" else "job_failed", reason=reason, wait_seconds=wait)


def cluster_is_ours() -> bool:
    """Tell whether this process's environment names the cluster, so that a job cannot have named a wrong one."""
    return any(os.environ.get(name) for name, field in ENVIRONMENT.items() if field == ("cluster", "address"))


def goes_on(db: Database, job: Job) -> str:
    """Say what has become of a job that was put back."""
    with suppress(storage_errors.StorageError):
        now = jobs.get(db, job.id)
        if now.state == "queued":
            return f"job {job.id} is back in the queue and goes on where it was when the job file is run again"
        return f"job {job.id} is {now.state}" + (f": {now.error}" if now.error else "")
    return f"job {job.id} goes on where it was when its lease has ended and the job file is run again"


def quietly(action: Callable[[], object]) -> None:
    """Record a job's end where the database still takes it; what made it end is what is reported."""
    with suppress(storage_errors.StorageError):
        action()


@contextmanager
def heartbeat(
    db: Database, job: Job, progress: Progress, lease_seconds: float = LEASE_SECONDS
) -> Iterator[Callable[[], None]]:
    """Extend the job's lease and store its progress, from a thread; when the lease is lost, writes are refused.

    Yields a function that raises the storage's LeaseLost once a heartbeat was refused.
    """
    stop = threading.Event()
    lost: list[storage_errors.LeaseLost] = []

    def still_held() -> None:
        if lost:
            raise lost[0]

    def beat() -> None:
        while not stop.wait(lease_seconds / HEARTBEATS_PER_LEASE):
            try:
                leases.heartbeat(db, job, lease_seconds, asdict(progress.state))
            except storage_errors.LeaseLost as error:
                lost.append(error)
                return  # the job's own next write meets the same error and ends it
            except storage_errors.DatabaseError:
                continue  # the next beat may get through while the lease still holds

    thread = threading.Thread(target=beat, name=f"heartbeat of job {job.id}", daemon=True)
    thread.start()
    try:
        yield still_held
    finally:
        stop.set()
        thread.join()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into one KeyboardInterrupt; later ones are ignored while cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt  # not an Exception, so that nothing on the way takes it for a failure

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
