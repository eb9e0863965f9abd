"""Start the workers of a job, or reuse those of the job before."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from optimizer.job.inputs import JobInputs, model_source
from optimizer.job.loading import ENVIRONMENT
from optimizer.search.space import plan_space
from optimizer.service import hooks
from optimizer.service.logs import log
from optimizer.service.main_thread import MainThread
from optimizer.stages.progress import Progress
from workers.errors import ClusterError

if TYPE_CHECKING:
    from workers.cluster.pool import WorkerPool
    from workers.cluster.settings import ClusterSettings
    from workers.cluster.share import PoolShare

Lend = Callable[["JobInputs", Callable[[], None]], "PoolShare"]
"""Gives a job its share of a pool; while it waits, it calls the second argument, which may raise to end the wait."""

LOCAL = "local"

WAIT_SECONDS = 1.0
"""Between two looks at whether the service is stopped, while a job waits for others to end."""


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

    with _without_secrets():
        pool = WorkerPool(cluster_settings(inputs), model_source(inputs.spec), inputs.task).start()
    for hint in hints(pool):
        log("hint", model=inputs.spec.model.path, hint=hint)
    return pool


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Hide the hooks' secret and the database URL, which may hold a password, from Ray, which inherits environments."""
    names = [hooks.SECRET, *(name for name, field in ENVIRONMENT.items() if field == ("database",))]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class PoolCache:
    """Share one worker pool among the jobs of a service, at the same time and one after another.

    A job that needs another model or other worker settings waits until those that use the pool have ended, and jobs
    that come after it wait for it. Only pools on this machine are kept without a job: elsewhere an idle pool would hold
    other people's resources, and the files of a model could change unseen.
    """

    def __init__(self, in_main_thread: MainThread) -> None:
        self._in_main_thread = in_main_thread
        self._pool: WorkerPool | None = None
        self._lock = threading.Condition(threading.RLock())
        self._users = 0
        self._waiting: list[JobInputs] = []
        self._interrupted = False

    @contextmanager
    def lent(self) -> Iterator[Lend]:
        """Lend the pool to a job for the block; the function starts it where there is none that suits.

        The function raises UsageFault and ClusterError as :func:`open_pool`. A block that raises ClusterError ends the
        pool that it was lent; other jobs that use it get that error too.
        """
        shares: list[PoolShare] = []
        pools: list[WorkerPool] = []
        failure: ClusterError | None = None

        def lend(inputs: JobInputs, still_wanted: Callable[[], None]) -> PoolShare:
            with self._lock:
                self._prepare(inputs, still_wanted)
                assert self._pool is not None
                check_plan_space(inputs, self._pool)
                pools.append(self._pool)
                shares.append(self._pool.share(inputs.task))
                self._users += 1
            return shares[0]

        try:
            yield lend
        except ClusterError as error:
            failure = error
            raise
        finally:
            with self._lock:
                for share in shares:
                    share.close()
                    self._users -= 1
                if failure is not None and self._pool in pools:  # not one that another job has started meanwhile
                    self.close(failure)
                self._lock.notify_all()

    def close(self, reason: ClusterError | None = None) -> None:
        """Stop the workers; jobs that use them get the ``reason``, a ClusterLost where there is none."""
        with self._lock:
            if self._pool is not None:
                pool, self._pool = self._pool, None
                self._in_main_thread(partial(pool.close, reason))

    def close_idle(self) -> None:
        """Stop the workers if no job uses them."""
        with self._lock:
            if not self._users:
                self.close()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the threads of all jobs that wait for workers."""
        self._interrupted = True  # without the lock: who has it may wait for this thread
        if (pool := self._pool) is not None:
            pool.interrupt()

    def _prepare(self, inputs: JobInputs, still_wanted: Callable[[], None]) -> None:
        """Have a pool that suits a job, once no job that came before it waits and none needs one that does not.

        While it starts the lock is free, so that jobs behind this one may stop waiting.
        """
        self._waiting.append(inputs)
        try:
            while self._waiting[0] is not inputs or (self._users and not self._suits(self._pool, inputs)):
                self._lock.wait(WAIT_SECONDS)
                if self._interrupted:
                    raise KeyboardInterrupt
                still_wanted()
            if self._users:
                return
            self._close_unless_it_suits(inputs)
            if self._pool is None:
                self._lock.release()
                try:
                    started = self._in_main_thread(partial(_start, inputs))
                finally:
                    self._lock.acquire()
                self._pool = started
            if self._interrupted:
                raise KeyboardInterrupt
        finally:
            self._waiting = [each for each in self._waiting if each is not inputs]
            self._lock.notify_all()

    def _close_unless_it_suits(self, inputs: JobInputs) -> None:
        pool = self._pool
        if pool is not None and pool.cluster.address == LOCAL and pool.idle and self._suits(pool, inputs):
            try:
                pool.check_cluster()  # it may have ended while no job was running
            except ClusterError:
                self.close()  # what is left of it is no use; a new one may do
        else:
            self.close()

    def _suits(self, pool: WorkerPool | None, inputs: JobInputs) -> bool:
        return (
            pool is not None
            and pool.cluster == cluster_settings(inputs)
            and pool.model == model_source(inputs.spec)
            and inputs.fingerprint in ("", pool.fingerprint)
        )
