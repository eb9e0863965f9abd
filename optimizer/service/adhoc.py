"""Work of one command on a job's model and task, done here and now: it stands in the database as a job of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optimizer.errors import Interrupted
from optimizer.job.inputs import JobInputs
from optimizer.service.runner import LEASE_SECONDS, Heartbeat, new_owner, quietly, stop_signals, stored_spec
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs
from workers.cluster.pool import WorkerPool
from workers.text import one_line


@contextmanager
def adhoc_job(
    db: Database, inputs: JobInputs, pool: WorkerPool, progress: Progress, purpose: str
) -> Iterator[JobContext]:
    """A context as the stages of a job have it; ``purpose`` tells the job's specification from the whole job's.

    What is measured and evaluated is stored as it comes, so that the command goes on where it was when run again.
    Raises Interrupted, and what the work itself raises.
    """
    job = jobs.submit_claimed(db, stored_spec(inputs.spec), f"{purpose} {inputs.spec_hash}", new_owner(), LEASE_SECONDS)
    try:
        with Heartbeat(db, job, progress), stop_signals():
            yield JobContext(db, job, inputs, pool, progress)
        jobs.finish(db, job)
    except KeyboardInterrupt:
        quietly(lambda: jobs.fail(db, job, "interrupted"))
        raise Interrupted("interrupted; what was measured is kept, run the command again to go on") from None
    except BaseException as error:
        reason = one_line(error) if isinstance(error, JobFailed) else f"{type(error).__name__}: {one_line(error)}"
        quietly(lambda: jobs.fail(db, job, reason))
        raise
