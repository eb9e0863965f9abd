"""The service: claim queued jobs and run them, one after another, until stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from optimizer.errors import Interrupted, LeaseLost, UsageFault
from optimizer.job.inputs import JobInputs, prepare
from optimizer.service import logs
from optimizer.service.pool import PoolCache
from optimizer.service.runner import (
    LEASE_SECONDS,
    POLL_SECONDS,
    Heartbeat,
    new_owner,
    process,
    put_back,
    quietly,
    read_spec,
    stop_signals,
)
from optimizer.stages.context import JobFailed
from optimizer.stages.progress import Progress, State
from storage import errors as storage_errors
from storage.database import Database
from storage.queue import jobs
from storage.queue.jobs import Job
from workers.errors import ClusterError, WorkersError
from workers.text import one_line

if TYPE_CHECKING:
    from workers.cluster.pool import WorkerPool

IDLE_SECONDS = 30.0
"""Workers are kept so long for a next job, then let go."""

OUTAGE_SECONDS = 10.0
"""Between two tries to reach a database that was there before."""

LONGEST_REST_SECONDS = 300.0


class LoggedNotes:
    """Tells the log what a job finds worth saying, and each stage as it begins."""

    def __init__(self) -> None:
        self._stage = ""

    def update(self, state: State) -> None:
        """Say that a stage begins; how far it is stands in the database."""
        if state.stage != self._stage:
            self._stage = state.stage
            logs.log("stage", stage=state.stage, total=state.total)

    def note(self, text: str) -> None:
        """Say what should stay."""
        logs.log("note", text=text)


class Server:
    """One serving process. ``run`` returns the number of jobs that it took."""

    def __init__(
        self, db: Database, *, progress: Callable[[Job], Progress], lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._db, self._progress, self._lease_seconds = db, progress, lease_seconds
        self._owner = new_owner()
        self._done = 0
        self._failures_in_a_row = 0

    def run(self, *, once: bool) -> int:
        """Serve until stopped; with ``once`` until no job is queued. Raises Interrupted."""
        logs.log("serving", owner=self._owner, database=self._db.safe_url)
        idle_since = time.monotonic()
        try:
            with stop_signals(), PoolCache() as held:
                while True:
                    job = self._claim()
                    if job is not None:
                        self._done += 1
                        self._serve(job, held)
                        idle_since = time.monotonic()
                        continue
                    if once and self._nothing_queued():
                        return self._done
                    if time.monotonic() - idle_since > IDLE_SECONDS:
                        held.close()
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped after {self._done} jobs") from None
        finally:
            logs.log("stopped_serving", jobs=self._done)

    def _claim(self) -> Job | None:
        """The next job. A database that cannot be reached is waited for: the service is there to stay."""
        try:
            return jobs.claim(self._db, self._owner, self._lease_seconds)
        except storage_errors.DatabaseError as error:
            logs.log("database_away", reason=one_line(error))
            time.sleep(OUTAGE_SECONDS)
            return None

    def _nothing_queued(self) -> bool:
        return jobs.count(self._db)["queued"] == 0

    def _serve(self, job: Job, held: PoolCache) -> None:
        """One claimed job; neither what is wrong with it nor what happens around it ends the service."""
        with logs.of_job(job.id):
            logs.log("job_claimed", attempt=job.attempt, model=job.spec["model"]["path"], task=job.spec["task"])
            progress = self._progress(job)
            try:
                prepared = self._prepare(job, held, progress)
                if prepared is not None:
                    process(self._db, job, *prepared, progress, self._lease_seconds)
                self._failures_in_a_row = 0
            except (JobFailed, LeaseLost):
                self._failures_in_a_row = 0  # the job's own end, which is on record
            except ClusterError:
                held.close()
                self._rest()
            except storage_errors.DatabaseError:
                self._rest()
            except Interrupted:
                raise KeyboardInterrupt from None
            except Exception as error:
                # A defect of ours: it is on the job's record, and must not keep other jobs from being run.
                logs.log("unexpected", reason=f"{type(error).__name__}: {one_line(error)}")

    def _prepare(self, job: Job, held: PoolCache, progress: Progress) -> tuple[JobInputs, WorkerPool] | None:
        """The job's inputs and workers; None when the job cannot be done, which is recorded."""
        try:
            with Heartbeat(self._db, job, progress, self._lease_seconds):
                inputs = prepare(read_spec(job))
                return inputs, held.get(inputs)
        except ClusterError as error:
            put_back(self._db, job, one_line(error))
            raise
        except (UsageFault, WorkersError) as error:
            reason = one_line(error)
            quietly(lambda: jobs.fail(self._db, job, reason))
            logs.log("job_failed", reason=reason)
            return None
        except KeyboardInterrupt:
            quietly(lambda: jobs.release(self._db, job, "interrupted"))
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            quietly(lambda: jobs.fail(self._db, job, reason))
            raise

    def _rest(self) -> None:
        """After the surroundings failed, do not run through the whole queue with them."""
        pause = min(LONGEST_REST_SECONDS, POLL_SECONDS * 2**self._failures_in_a_row)
        self._failures_in_a_row += 1
        logs.log("resting", seconds=pause)
        time.sleep(pause)
