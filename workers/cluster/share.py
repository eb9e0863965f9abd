"""Share one pool of workers between jobs: the same model, and each its own task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import ray

from workers.messages import Request, WorkerInfo
from workers.tasks import Task

from .actor import task_key
from .slots import Result

if TYPE_CHECKING:
    from .pool import WorkerPool


class PoolShare:
    """One job's share of a pool: all of its workers, asked about the job's task. Closed when the job ends."""

    def __init__(self, pool: WorkerPool, task: Task) -> None:
        self._pool, self.task, self.key = pool, task, task_key(task)
        self.reference = ray.put(task)
        self.retries = 0
        """Requests that went to another worker since they were last taken."""

    def __enter__(self) -> PoolShare:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that the workers hold."""
        return self._pool.fingerprint

    @property
    def dtype(self) -> str:
        """What the workers compute in."""
        return self._pool.dtype

    @property
    def info(self) -> tuple[WorkerInfo, ...]:
        """Descriptions of the workers that are ready."""
        return self._pool.info

    @property
    def size(self) -> int:
        """Number of workers, those being replaced included."""
        return self._pool.size

    def take_retries(self) -> int:
        """Return how many of the share's requests went to another worker since the last call."""
        retries, self.retries = self.retries, 0
        return retries

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        """Do all requests, as :meth:`WorkerPool.run`."""
        return self._pool.run(requests, self)

    def close(self) -> None:
        """Let the workers drop what they keep for the task, if no other share is of it."""
        self._pool.end_share(self)
