"""From a queued job to its final state: claim it, keep its lease alive, run the pipeline, say how it ended."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from optimizer import pipeline
from optimizer.errors import Interrupted, LeaseLost, UsageFault, one_line
from optimizer.inputs import Inputs, model_source, prepare
from optimizer.job import DEFAULT_DATABASE, JobSpec, validate_job
from optimizer.progress import Progress
from optimizer.space import plan_space
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.publish import Published
from storage import errors as storage_errors
from storage import jobs
from storage.database import Database
from storage.jobs import Job
from workers.errors import ClusterError, WorkersError

if TYPE_CHECKING:
    from workers.pool import WorkerPool

LEASE_SECONDS = 30.0
HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 1.0


def new_owner() -> str:
    """A name for this process that no other process has or had."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def stored_spec(spec: JobSpec) -> dict[str, Any]:
    """A job's specification as the database keeps it: without the database's own URL, which may hold a password."""
    return spec.model_dump(mode="json", exclude={"database"})


def read_spec(job: Job) -> JobSpec:
    """The specification of a stored job. Raises UsageFault when this version cannot read it."""
    return validate_job({**job.spec, "database": DEFAULT_DATABASE}, f"job {job.id}")


@contextmanager
def open_pool(inputs: Inputs) -> Iterator[WorkerPool]:
    """Workers that hold the job's model and task, checked against what the job asks of the model.

    Raises UsageFault when the model cannot be loaded or lacks what the job names, ClusterError when the cluster
    cannot be used.
    """
    from workers.cluster import ClusterSettings
    from workers.pool import WorkerPool

    cluster = inputs.spec.cluster
    settings = ClusterSettings(
        address=cluster.address,
        workers=None if cluster.workers == "auto" else cluster.workers,
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        batch_size=cluster.batch_size,
        request_timeout_seconds=cluster.request_timeout_seconds,
    )
    with WorkerPool(settings, model_source(inputs.spec), inputs.task) as pool:
        plan_space(inputs.spec, pool.info[0])
        yield pool


def claim_this(db: Database, job: Job, owner: str, note: Callable[[str], None] = lambda text: None) -> Job:
    """Claim a given job, waiting for the lease of an owner that died. Raises UsageFault when somebody is running it."""
    seen = job.lease_expires_at
    told = False
    while True:
        claimed = jobs.claim(db, owner, LEASE_SECONDS, job.id)
        if claimed is not None:
            return claimed
        now = jobs.get(db, job.id)
        if now.is_finished:
            raise UsageFault(f"job {job.id} has meanwhile ended as {now.state}; run the job file again to see it")
        if now.lease_expires_at is not None and seen is not None and now.lease_expires_at > seen:
            raise UsageFault(f"job {job.id} of the same specification is being run by {now.owner}; wait for it")
        seen = now.lease_expires_at
        if not told:
            note(f"job {job.id} was last run by {now.owner}; waiting for a sign of life or the end of its lease")
            told = True
        time.sleep(POLL_SECONDS)


def process(db: Database, job: Job, inputs: Inputs, pool: WorkerPool, progress: Progress) -> Published:
    """Run a claimed job to its final state.

    An interrupted job, and one whose cluster or database failed, goes back to the queue and can be resumed. Raises
    Interrupted, JobFailed, LeaseLost, ClusterError, DatabaseError.
    """
    heartbeat = Heartbeat(db, job, progress)
    try:
        with heartbeat, stop_signals():
            published = pipeline.run(JobContext(db, job, inputs, pool, progress))
    except KeyboardInterrupt:
        _quietly(lambda: jobs.release(db, job, "interrupted"))
        raise Interrupted(
            f"interrupted; job {job.id} is back in the queue and goes on where it was when the job file is run again"
        ) from None
    except storage_errors.LeaseLost as error:
        raise LeaseLost(str(error)) from None
    except (ClusterError, storage_errors.DatabaseError) as error:
        reason = one_line(error)  # the name 'error' is unbound when the release runs
        _quietly(lambda: jobs.release(db, job, reason))
        raise
    except BaseException as error:
        reason = one_line(error) if isinstance(error, JobFailed) else f"{type(error).__name__}: {one_line(error)}"
        _quietly(lambda: jobs.fail(db, job, reason))
        raise
    if published.best is None:
        jobs.infeasible(db, job, published.reason)
    else:
        jobs.finish(db, job)
    return published


def _quietly(action: Callable[[], object]) -> None:
    """Do what can still be done for a job; what made it end is what is reported."""
    with suppress(storage_errors.StorageError):
        action()


def serve(db: Database, *, once: bool, progress: Callable[[Job], Progress], note: Callable[[str], None]) -> int:
    """Claim and run queued jobs until stopped; with ``once`` until the queue is empty. Returns the number of jobs run.

    Raises Interrupted, or ClusterError and DatabaseError after putting the job back.
    """
    owner = new_owner()
    done = 0
    while True:
        job = jobs.claim(db, owner, LEASE_SECONDS)
        if job is None:
            if once:
                return done
            time.sleep(POLL_SECONDS)
            continue
        done += 1
        note(f"job {job.id}: {job.spec['model']['path']} on {job.spec['task']}")
        _serve_one(db, job, progress(job), note)


def _serve_one(db: Database, job: Job, progress: Progress, note: Callable[[str], None]) -> None:
    """One claimed job; what is wrong with the job itself ends the job, not the service."""
    with ExitStack() as stack:
        try:
            with Heartbeat(db, job, progress):
                inputs = prepare(read_spec(job))
                pool = stack.enter_context(open_pool(inputs))
        except ClusterError as error:
            reason = one_line(error)
            _quietly(lambda: jobs.release(db, job, reason))
            raise
        except (UsageFault, WorkersError) as error:
            jobs.fail(db, job, one_line(error))
            note(f"job {job.id} failed: {one_line(error)}")
            return
        except KeyboardInterrupt:
            _quietly(lambda: jobs.release(db, job, "interrupted"))
            raise Interrupted(f"interrupted; job {job.id} is back in the queue") from None
        try:
            published = process(db, job, inputs, pool, progress)
        except (JobFailed, LeaseLost) as error:
            note(f"job {job.id} ended: {one_line(error)}")
        else:
            note(f"job {job.id} {'succeeded' if published.best is not None else 'found no feasible plan'}")


class Heartbeat:
    """A thread that extends the job's lease and stores its progress; when the lease is lost, writes are refused."""

    def __init__(self, db: Database, job: Job, progress: Progress) -> None:
        self._db, self._job, self._progress = db, job, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat of job {job.id}", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                jobs.heartbeat(self._db, self._job, LEASE_SECONDS, asdict(self._progress.state))
            except storage_errors.LeaseLost:
                return  # the job's own next write meets the same error and ends it
            except storage_errors.DatabaseError:
                continue  # the next beat may get through while the lease still holds


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
