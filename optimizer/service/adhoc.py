"""Run one CLI command (``redundancy``, ``validate-theory``) as a claimed job, so that a rerun resumes its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optimizer.job.inputs import JobInputs
from optimizer.service.pool import open_pool
from optimizer.service.runner import LEASE_SECONDS, attempt, new_owner, stored_spec
from optimizer.stages.context import JobContext
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs, leases


@contextmanager
def adhoc_job(db: Database, inputs: JobInputs, progress: Progress, purpose: str) -> Iterator[JobContext]:
    """Start workers and claim a job of its own for a command; ``purpose`` keeps it apart from the whole job.

    Raises UsageFault and ClusterError as :func:`open_pool`, Interrupted, and what the work itself raises.
    """
    with open_pool(inputs, progress) as pool:
        known_by = f"{purpose} {inputs.spec_hash}"
        job = jobs.submit_claimed(db, stored_spec(inputs.spec), known_by, new_owner(), LEASE_SECONDS)
        with attempt(db, job, progress, resumable=False):
            yield JobContext(db, job, inputs, pool, progress)
        leases.finish(db, job)
