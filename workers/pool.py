"""A pool of model-holding workers that outlives any one of them.

One request is in flight per worker, handed out in order. A worker that dies or takes too long is replaced and its
request given to another one, up to a number of attempts; then the request comes back as a Failure. Requests that
measure time run alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .actor import Worker, WorkerSettings
from .checkpoints import check_checkpoint, find_checkpoint
from .cluster import LOCAL, ClusterSettings, allot, connect, disconnect
from .errors import ClusterError, WorkersError
from .messages import CompareLatency, Failure, ModelSource, ProfileLatency, Reply, Request, WorkerInfo
from .tasks import Task, TaskSpec, load_task

EXCLUSIVE = (ProfileLatency, CompareLatency)
"""Requests during which no other worker may run: they measure time."""

FAILED_STARTS = 3
"""Replacements of one worker that may fail in a row before it is given up."""

LONGEST_WAIT_SECONDS = 1.0

Result = Reply | Failure


@dataclass
class _Ticket:
    number: int
    request: Request
    attempts: int = 0


@dataclass
class _Slot:
    """The place of one worker: its actor now, and the call in flight (``setup`` while it has no ticket)."""

    number: int
    actor: Any
    reference: Any
    deadline: float
    ticket: _Ticket | None = None
    info: WorkerInfo | None = None
    failed_starts: int = 0


class WorkerPool:
    """Workers that hold one model and one task.

    Use as a context manager, or call :meth:`start` and :meth:`close`. ``task`` is a bundled task's name, the path of a
    task file, a spec, or a loaded task.

    Raises:
        TaskError: the task or its data cannot be used (before any cluster is touched).
    """

    def __init__(self, cluster: ClusterSettings, model: ModelSource, task: Task | TaskSpec | str | Path) -> None:
        self.cluster, self.model = cluster, model
        self.task = task if isinstance(task, Task) else load_task(task)
        self._slots: list[_Slot] = []
        self._queue: deque[_Ticket] = deque()
        self._finished: deque[tuple[int, Result]] = deque()
        self._tickets = 0
        self._owns_connection = False
        self._fingerprint = ""

    def __enter__(self) -> WorkerPool:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> WorkerPool:
        """Connect, start the workers, and wait until each holds the model.

        Raises:
            ModelError: the model cannot be loaded.
            ClusterError: the cluster cannot be reached or has too little; or workers die or hang while loading.
        """
        if self.cluster.address == LOCAL:
            # This machine's files are the workers' files: say what is wrong at once, and download only once.
            check_checkpoint(find_checkpoint(self.model))
        self._owns_connection = connect(self.cluster)
        try:
            self._allotment = allot(self.cluster, model_device=self.model.device)
            self._task_reference = ray.put(self.task)
            self._slots = [self._new_slot(number) for number in range(self._allotment.workers)]
            for slot in self._slots:
                self._finish_first_start(slot)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop all workers, and the cluster if this pool started it. Unfinished requests are dropped."""
        for slot in self._slots:
            self._kill(slot)
        self._slots = []
        self._queue.clear()
        if self._owns_connection:
            self._owns_connection = False
            disconnect()

    @property
    def info(self) -> tuple[WorkerInfo, ...]:
        """What the workers that are ready say about themselves."""
        return tuple(slot.info for slot in self._slots if slot.info is not None)

    @property
    def size(self) -> int:
        """Number of workers, those being replaced included."""
        return len(self._slots)

    @property
    def pending(self) -> int:
        """Requests submitted whose result :meth:`next_done` has not handed out yet."""
        running = sum(slot.ticket is not None for slot in self._slots)
        return len(self._queue) + running + len(self._finished)

    def submit(self, request: Request) -> int:
        """Queue a request, starting it if a worker is free; return its number."""
        number = self._tickets
        self._tickets += 1
        self._queue.append(_Ticket(number, request))
        self._dispatch()
        return number

    def next_done(self, timeout: float | None = None) -> tuple[int, Result] | None:
        """Wait for any request to finish; return its number and result.

        Returns None when nothing is pending, or nothing finished within ``timeout`` seconds.

        Raises:
            ClusterError: no worker is left and none can be started.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        while not self._finished:
            if not self.pending:
                return None
            self._dispatch()
            self._wait(give_up)
            self._replace_overdue()
            if not self._finished and give_up is not None and time.monotonic() >= give_up:
                return None
        return self._finished.popleft()

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        """Do all requests; yield the index of each and its result as they finish.

        Raises:
            ClusterError: as :meth:`next_done`.
        """
        indices = {self.submit(request): index for index, request in enumerate(requests)}
        while indices:
            done = self.next_done()
            if done is None:
                raise ClusterError("the pool was closed while requests were running")
            number, result = done
            if number in indices:
                yield indices.pop(number), result

    # Handing out ------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._queue:
            busy = [slot for slot in self._slots if slot.reference is not None]
            exclusive = isinstance(self._queue[0].request, EXCLUSIVE)
            if (exclusive and busy) or len(busy) == len(self._slots):
                return
            if any(slot.ticket is not None and isinstance(slot.ticket.request, EXCLUSIVE) for slot in busy):
                return
            slot = next(slot for slot in self._slots if slot.reference is None)
            slot.ticket = self._queue.popleft()
            slot.ticket.attempts += 1
            slot.reference = slot.actor.handle.remote(slot.ticket.request)
            slot.deadline = time.monotonic() + self.cluster.request_timeout_seconds

    def _wait(self, give_up: float | None) -> None:
        flying = {slot.reference: slot for slot in self._slots if slot.reference is not None}
        if not flying:
            raise ClusterError("no worker is left to do the remaining requests")
        now = time.monotonic()
        moments = [slot.deadline for slot in flying.values()] + ([] if give_up is None else [give_up])
        patience = min(max(0.0, min(moments) - now), LONGEST_WAIT_SECONDS)
        ready, _ = ray.wait(list(flying), num_returns=1, timeout=patience)
        for reference in ready:
            self._collect(flying[reference])

    # Taking back ------------------------------------------------------------------------------------------------

    def _collect(self, slot: _Slot) -> None:
        try:
            value = ray.get(slot.reference)
        except RayTaskError as error:
            self._raised(slot, error.cause)
        except RayError as error:
            self._lost(slot, _describe_death(error))
        else:
            slot.reference = None
            if slot.ticket is None:
                self._ready(slot, value)
            else:
                self._finished.append((slot.ticket.number, value))
                slot.ticket = None

    def _raised(self, slot: _Slot, cause: BaseException) -> None:
        """A call raised in the worker, which lives on. Trying again would give the same error."""
        reason = _describe(cause)
        if slot.ticket is None:
            self._lost(slot, reason)
            return
        slot.reference = None
        self._fail(slot.ticket, reason)
        slot.ticket = None

    def _lost(self, slot: _Slot, reason: str) -> None:
        """A worker is gone, or could not load the model: replace it, and give its request to another."""
        self._kill(slot)
        ticket = slot.ticket
        if ticket is None:
            slot.failed_starts += 1
        elif ticket.attempts >= self.cluster.max_attempts:
            self._fail(ticket, reason)
        else:
            self._queue.appendleft(ticket)
        position = self._slots.index(slot)
        if slot.failed_starts < FAILED_STARTS:
            self._slots[position] = self._new_slot(slot.number, slot.failed_starts)
            return
        del self._slots[position]
        if not self._slots:
            raise ClusterError(f"no worker is left; the last one failed: {reason}")

    def _fail(self, ticket: _Ticket, reason: str) -> None:
        self._finished.append((ticket.number, Failure(ticket.request, reason, ticket.attempts)))

    def _replace_overdue(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot in self._slots if slot.reference is not None and slot.deadline <= now]:
            what = "load the model" if slot.ticket is None else "answer"
            seconds = self.cluster.load_timeout_seconds if slot.ticket is None else self.cluster.request_timeout_seconds
            self._lost(slot, f"the worker took longer than {seconds:g} s to {what}")

    # Workers ----------------------------------------------------------------------------------------------------

    def _new_slot(self, number: int, failed_starts: int = 0) -> _Slot:
        settings = WorkerSettings(
            worker=number,
            threads=self.cluster.threads,
            holds_gpu=self._allotment.gpus > 0,
            batch_size=self.cluster.batch_size,
        )
        actor = (
            ray.remote(Worker)
            .options(num_cpus=self._allotment.cpus, num_gpus=self._allotment.gpus, max_restarts=0, max_task_retries=0)
            .remote(self.model, self._task_reference, settings)
        )
        deadline = time.monotonic() + self.cluster.load_timeout_seconds
        return _Slot(number, actor, actor.setup.remote(), deadline, failed_starts=failed_starts)

    def _finish_first_start(self, slot: _Slot) -> None:
        """Wait for a worker of the first set; unlike a replacement's, its failure is an error of the whole pool."""
        ready, _ = ray.wait([slot.reference], timeout=max(0.0, slot.deadline - time.monotonic()))
        if not ready:
            free = ray.available_resources()
            raise ClusterError(
                f"worker {slot.number} was not ready after {self.cluster.load_timeout_seconds:g} s; it needs "
                f"{self._allotment.cpus:g} CPUs and {self._allotment.gpus:g} GPUs, of which "
                f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free in the cluster"
            )
        try:
            info: WorkerInfo = ray.get(slot.reference)
        except RayTaskError as error:
            if isinstance(error.cause, WorkersError):
                raise error.cause from None
            raise ClusterError(f"worker {slot.number} could not start: {_describe(error.cause)}") from None
        except RayError as error:
            raise ClusterError(
                f"worker {slot.number} could not load the model: {_describe_death(error)}; memory is needed for "
                f"{self._allotment.workers} models (cluster.workers), and skipplan must be installed on every node"
            ) from None
        slot.reference = None
        self._ready(slot, info)

    def _ready(self, slot: _Slot, info: WorkerInfo) -> None:
        self._fingerprint = self._fingerprint or info.model_fingerprint
        if info.model_fingerprint != self._fingerprint:
            raise ClusterError(
                f"worker {info.worker} on {info.node} holds another model than the others (fingerprint "
                f"{info.model_fingerprint[:12]}, not {self._fingerprint[:12]}): {self.model.path} differs between nodes"
            )
        slot.info, slot.failed_starts = info, 0

    def _kill(self, slot: _Slot) -> None:
        if ray.is_initialized():
            ray.kill(slot.actor, no_restart=True)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, WorkersError) else f"{type(error).__name__}: {text}"


def _describe_death(error: RayError) -> str:
    """Say why an actor is gone; what its start raised stands in the last line of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "creation task" in lines[0]:
        return lines[-1]
    return f"the worker's process died ({type(error).__name__}): killed, crashed, or out of memory"
