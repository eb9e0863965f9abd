"""Serve the queue: claim jobs and run them, one after another or some at the same time, until stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING

from optimizer.errors import Fault, Interrupted
from optimizer.job.inputs import JobInputs, prepare
from optimizer.job.loading import read_spec
from optimizer.job.result import tasks_of_job
from optimizer.service import channel, hooks, logs
from optimizer.service.main_thread import MainThread
from optimizer.service.pool import Lend, PoolCache
from optimizer.service.runner import LEASE_SECONDS, POLL_SECONDS, new_owner, process, stop_signals
from optimizer.stages.progress import Progress, StageLines, State
from storage import errors as storage_errors
from storage.database import Database
from storage.queue import jobs, leases
from storage.queue.jobs import Job
from workers.errors import ClusterError, WorkersError
from workers.text import one_line

if TYPE_CHECKING:
    from workers.cluster.share import PoolShare

IDLE_SECONDS = 30.0
"""Workers are kept so long for a next job, then let go."""

OUTAGE_SECONDS = 10.0
"""Between two tries to reach a database that was there before."""

LONGEST_PAUSE_SECONDS = 300.0


def logged_stages() -> StageLines:
    """Log a job's notes and its stages."""

    def write(event: str, state: State) -> None:
        within = {"done": state.done, "news": state.news} if event == "progress" else {}
        logs.log(event, stage=state.stage, total=state.total, **within)

    return StageLines(write, lambda text: logs.log("note", text=text))


class Server:
    """Run queued jobs in this process, so many ``at_once``, with workers that are kept between jobs.

    Jobs at the same time share workers where they need the same model and worker settings; others wait.
    """

    def __init__(
        self,
        db: Database,
        *,
        progress: Callable[[Job], Progress],
        lease_seconds: float = LEASE_SECONDS,
        at_once: int = 1,
    ) -> None:
        self._db, self._progress, self._lease_seconds, self._at_once = db, progress, lease_seconds, at_once
        self._owner = new_owner()
        self._taken: list[int] = []
        self._failures_in_a_row = 0
        self._stopping = threading.Event()
        self._main_thread = MainThread()

    def run(self, *, once: bool) -> int:
        """Serve until stopped, with ``once`` until no job is queued; return the number of jobs taken.

        Raises Interrupted.
        """
        logs.log("serving", owner=self._owner, database=self._db.safe_url, at_once=self._at_once)
        try:
            with stop_signals(), hooks.delivering(self._db), closing(PoolCache(self._main_thread)) as pools:
                if self._at_once == 1:
                    self._take_jobs(pools, once=once)
                else:
                    self._take_jobs_in_threads(pools, once=once)
                return len(self._taken)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped after {len(self._taken)} jobs") from None
        finally:
            logs.log("stopped_serving", jobs=len(self._taken))

    def _take_jobs_in_threads(self, pools: PoolCache, *, once: bool) -> None:
        errors: list[BaseException] = []

        def take() -> None:
            try:
                self._take_jobs(pools, once=once)
            except BaseException as error:
                errors.append(error)
                self._stopping.set()

        threads = [
            threading.Thread(target=copy_context().run, args=(take,), name=f"jobs {number}", daemon=True)
            for number in range(self._at_once)
        ]
        try:
            for thread in threads:
                thread.start()
            self._main_thread.serve(threads)
        except KeyboardInterrupt:
            self._stopping.set()
            pools.interrupt()
            self._main_thread.serve(threads)
            raise
        if errors:
            raise errors[0]

    def _take_jobs(self, pools: PoolCache, *, once: bool) -> None:
        idle_since = time.monotonic()
        while not self._stopping.is_set():
            job = self._claim()
            if job is not None:
                self._taken.append(job.id)
                self._serve(job, pools)
                idle_since = time.monotonic()
                continue
            if once and self._nothing_queued():
                return
            if time.monotonic() - idle_since > IDLE_SECONDS:
                pools.close_idle()
            self._stopping.wait(POLL_SECONDS)

    def _claim(self) -> Job | None:
        """Claim the next job, or wait and return None while the database cannot be reached."""
        try:
            return leases.claim(self._db, self._owner, self._lease_seconds)
        except storage_errors.DatabaseError as error:
            logs.log("database_away", reason=one_line(error))
            time.sleep(OUTAGE_SECONDS)
            return None

    def _nothing_queued(self) -> bool:
        return jobs.count(self._db)["queued"] == 0

    def _serve(self, job: Job, pools: PoolCache) -> None:
        """Run one claimed job. Neither an error of the job nor one of the cluster or database ends the service."""
        with logs.of_job(job.id):
            logs.log("job_claimed", attempt=job.attempt, model=job.spec["model"]["path"], task=tasks_of_job(job.spec))
            try:
                with pools.lent() as lend:
                    process(self._db, job, self._progress(job), partial(_start, job, lend), self._lease_seconds)
                self._failures_in_a_row = 0
            except Interrupted:
                raise KeyboardInterrupt from None
            except (ClusterError, storage_errors.DatabaseError):
                self._back_off()
            except (Fault, WorkersError):
                self._failures_in_a_row = 0  # the job's own end, which is on record
            except Exception as error:
                # A defect of ours: it is on the job's record, and must not keep other jobs from being run.
                logs.log("unexpected", reason=f"{type(error).__name__}: {one_line(error)}")
            finally:
                channel.tell_ended(job)

    def _back_off(self) -> None:
        """Pause twice as long after each cluster or database failure, so that one outage does not fail the queue."""
        pause = min(LONGEST_PAUSE_SECONDS, POLL_SECONDS * 2**self._failures_in_a_row)
        self._failures_in_a_row += 1
        logs.log("resting", seconds=pause)
        time.sleep(pause)


def _start(job: Job, lend: Lend, still_held: Callable[[], None]) -> tuple[JobInputs, PoolShare]:
    inputs = prepare(read_spec(job))
    return inputs, lend(inputs, still_held)
