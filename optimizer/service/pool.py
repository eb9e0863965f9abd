"""Start the workers of a job, or reuse those of the job before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from optimizer.job.inputs import JobInputs, model_source, task_hash
from optimizer.job.loading import ENVIRONMENT
from optimizer.search.space import plan_space
from optimizer.service.logs import log
from optimizer.stages.progress import Progress
from workers.errors import ClusterError

if TYPE_CHECKING:
    from workers.cluster.pool import WorkerPool
    from workers.cluster.settings import ClusterSettings

LOCAL = "local"


def cluster_settings(inputs: JobInputs) -> ClusterSettings:
    """Translate ``cluster`` of the job file into the settings of a worker pool."""
    from workers.cluster.settings import ClusterSettings

    cluster = inputs.spec.cluster
    return ClusterSettings(
        address=cluster.address,
        workers=None if cluster.workers == "auto" else cluster.workers,
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        memory_per_worker=cluster.memory_per_worker,
        batch_size=cluster.batch_size,
        max_attempts=cluster.max_attempts,
        load_timeout_seconds=cluster.load_timeout_seconds,
        request_timeout_seconds=cluster.request_timeout_seconds,
    )


@contextmanager
def open_pool(inputs: JobInputs, progress: Progress) -> Iterator[WorkerPool]:
    """Start workers that hold the job's model and task, and stop them in the end.

    Raises UsageFault when the model cannot be loaded or lacks what the job names, ClusterError when the cluster
    cannot be used.
    """
    progress.begin("start workers")
    pool = _start(inputs)
    try:
        check_plan_space(inputs, pool)
        for hint in hints(pool):
            progress.note(f"note: {hint}")
        progress.note(f"{pool.size} workers on {pool.info[0].device}, computing in {pool.dtype}")
        yield pool
    finally:
        pool.close()


def check_plan_space(inputs: JobInputs, pool: WorkerPool) -> None:
    """Raise UsageFault when the job protects a layer that the model lacks, or none of its layers has a choice."""
    plan_space(inputs.spec, pool.info[0])


def hints(pool: WorkerPool) -> list[str]:
    """List what would make the workers faster, each once."""
    return sorted({info.hint for info in pool.info if info.hint})


def _start(inputs: JobInputs) -> WorkerPool:
    from workers.cluster.pool import WorkerPool

    with _without_database_url():
        pool = WorkerPool(cluster_settings(inputs), model_source(inputs.spec), inputs.task).start()
    for hint in hints(pool):
        log("hint", model=inputs.spec.model.path, hint=hint)
    return pool


@contextmanager
def _without_database_url() -> Iterator[None]:
    """Hide the database URL from Ray: its processes inherit our environment, and the URL may hold a password."""
    names = [name for name, field in ENVIRONMENT.items() if field == ("database",)]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class PoolCache:
    """Cache one worker pool between jobs. It serves the next job if that needs the same model and worker settings.

    Only pools on this machine are kept: elsewhere an idle pool would hold other people's resources, and the files of a
    model could change unseen.
    """

    def __init__(self) -> None:
        self._pool: WorkerPool | None = None

    def get(self, inputs: JobInputs) -> WorkerPool:
        """Return the cached workers, with the job's task, where they fit the job, else new ones.

        Raises UsageFault and ClusterError as :func:`open_pool`.
        """
        pool = self._pool
        if pool is not None and self._fits(pool, inputs):
            try:
                pool.check_cluster()  # it may have ended while no job was running
                if task_hash(pool.task) != task_hash(inputs.task):
                    pool.change_task(inputs.task)
            except ClusterError:
                self.close()  # what is left of it is no use; a new one may do
        else:
            self.close()
        if self._pool is None:
            self._pool = _start(inputs)
        check_plan_space(inputs, self._pool)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.close()

    def _fits(self, pool: WorkerPool, inputs: JobInputs) -> bool:
        return (
            pool.cluster.address == LOCAL
            and pool.idle
            and pool.cluster == cluster_settings(inputs)
            and pool.model == model_source(inputs.spec)
            and pool.fingerprint == inputs.fingerprint
        )
