"""The workers of a job: starting them, and keeping them for a next job that needs just the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from optimizer.job.inputs import JobInputs, model_source, task_hash
from optimizer.job.loading import ENVIRONMENT
from optimizer.search.space import plan_space
from optimizer.service.logs import log
from workers.errors import ClusterError

if TYPE_CHECKING:
    from workers.cluster.connection import ClusterSettings
    from workers.cluster.pool import WorkerPool

LOCAL = "local"


def cluster_settings(inputs: JobInputs) -> ClusterSettings:
    """Where the job's workers run, as the workers' room understands it."""
    from workers.cluster.connection import ClusterSettings

    cluster = inputs.spec.cluster
    return ClusterSettings(
        address=cluster.address,
        workers=None if cluster.workers == "auto" else cluster.workers,
        cpus_per_worker=cluster.cpus_per_worker,
        gpus_per_worker=cluster.gpus_per_worker,
        memory_per_worker=cluster.memory_per_worker,
        batch_size=cluster.batch_size,
        max_attempts=cluster.max_attempts,
        request_timeout_seconds=cluster.request_timeout_seconds,
    )


@contextmanager
def open_pool(inputs: JobInputs) -> Iterator[WorkerPool]:
    """Workers that hold the job's model and task, checked against what the job asks of the model.

    Raises UsageFault when the model cannot be loaded or lacks what the job names, ClusterError when the cluster
    cannot be used.
    """
    pool = _start(inputs)
    try:
        plan_space(inputs.spec, pool.info[0])
        yield pool
    finally:
        pool.close()


def _start(inputs: JobInputs) -> WorkerPool:
    from workers.cluster.pool import WorkerPool

    with _without_database_url():
        pool = WorkerPool(cluster_settings(inputs), model_source(inputs.spec), inputs.task).start()
    for hint in hints(pool):
        log("hint", model=inputs.spec.model.path, hint=hint)
    return pool


def hints(pool: WorkerPool) -> list[str]:
    """What would make the workers faster, each thing once."""
    return sorted({info.hint for info in pool.info if info.hint})


@contextmanager
def _without_database_url() -> Iterator[None]:
    """Ray's processes take over the environment they are started from; the database's password is not for them."""
    names = [name for name, field in ENVIRONMENT.items() if field == ("database",)]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class PoolCache:
    """At most one pool, kept from job to job while nothing that its workers depend on differs but the task.

    Only pools on this machine are kept: elsewhere they would hold other people's resources while nothing is to do,
    and the files of a model could change unseen.
    """

    def __init__(self) -> None:
        self._pool: WorkerPool | None = None

    def __enter__(self) -> PoolCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def get(self, inputs: JobInputs) -> WorkerPool:
        """Workers for the job: those that are there if they fit, else new ones.

        Raises as :func:`open_pool`.
        """
        pool = self._pool
        if pool is not None and self._fits(pool, inputs):
            try:
                if task_hash(pool.task) != task_hash(inputs.task):
                    pool.change_task(inputs.task)
            except ClusterError:
                self.close()  # what is left of it is no use; a new one may do
        else:
            self.close()
        if self._pool is None:
            self._pool = _start(inputs)
        plan_space(inputs.spec, self._pool.info[0])
        return self._pool

    def close(self) -> None:
        """Stop the workers, if there are any."""
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
