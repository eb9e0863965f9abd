"""Pool workers that hold a model, and replace those that die.

One request is in flight per worker, handed out in order. A worker that dies or takes too long is replaced and its
request given to another one, up to a number of attempts; then the request comes back as a Failure. Requests that
measure time run alone on their device, while workers of other devices go on. Several threads may give requests to one
pool; one of them watches the workers, for all. Where the cluster loses a node, the pool goes on with fewer workers;
where it has room again for as many as were asked for, they are started.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from workers.cluster.settings import WorkerSettings
from workers.errors import ClusterError, ClusterLost, WorkersError
from workers.messages import (
    Failure,
    ModelSource,
    Request,
    WorkerInfo,
)
from workers.models.checkpoint import check_checkpoint, find_checkpoint
from workers.tasks import Task, TaskSpec, load_task
from workers.text import describe_error

from .actor import TaskReference, Worker
from .connection import UNLIMITED, HeadWatch, allot, connect, disconnect, room
from .settings import LOCAL, ClusterSettings
from .share import PoolShare
from .slots import Result, Slot, Ticket, describe_death
from .telemetry import Telemetry, log

FAILED_STARTS = 3
"""Replacements of one worker that may fail in a row before it is given up."""

LONGEST_WAIT_SECONDS = 1.0

SHARED_WAIT_SECONDS = 0.05
"""Longest wait for workers while several threads use the pool: one may hand out a request that is not waited for."""

PLACING_SECONDS = 30.0
"""For a replacement to be given its resources; after that the pool goes on without it."""

LOOK_SECONDS = 5.0
"""Between two looks at the cluster: whether its head answers, and whether there is room for more workers."""

NOTICE_SECONDS = 1.0
"""Until the cluster knows that a node is gone whose workers have died."""

PAUSE_SECONDS = 120.0
"""Before another worker is started in the place of one that could not load the model time after time."""


class WorkerPool:
    """Pool of workers that hold one model and one task, and the tasks of those that share it.

    Use as a context manager, or call :meth:`start` and :meth:`close`. ``task`` is a bundled task's name, the path of a
    task file, a spec, or a loaded task. ``worker`` is the class whose instances answer the requests.

    Raises:
        TaskError: the task or its data cannot be used (before any cluster is touched).
    """

    def __init__(
        self,
        cluster: ClusterSettings,
        model: ModelSource,
        task: Task | TaskSpec | str | Path,
        *,
        worker: type = Worker,
    ) -> None:
        self.cluster, self.model, self._worker = cluster, model, worker
        self.task = task if isinstance(task, Task) else load_task(task)
        self._slots: list[Slot] = []
        self._queue: deque[Ticket] = deque()
        self._finished: deque[tuple[int, Result]] = deque()
        self._tickets = 0
        self._lock = threading.Condition(threading.Lock())
        self._callers = 0
        """Threads that wait for results."""
        self._watched = False
        """Whether one of them waits for the workers, without the lock, on behalf of all."""
        self._ended: ClusterError | None = None
        """Why the pool does nothing more: a failure, which every thread gets, or that it was closed."""
        self._started = False
        self._interrupted = False
        self._shares: list[PoolShare] = []
        self._owns_connection = False
        self.fingerprint = ""
        """The fingerprint of the model that the workers hold, once the first is ready."""
        self.dtype = ""
        """What the workers compute in, once the first is ready; ``auto`` may mean something else on each node."""
        self._next_look = 0.0
        self._no_new_workers_before = 0.0

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
            model = self.model
            check_checkpoint(find_checkpoint(model), model.allow_pickle, trust_remote_code=model.trust_remote_code)
        self._owns_connection = connect(self.cluster)
        try:
            self._start_workers()
        except BaseException:
            self.close()
            raise
        return self

    def _start_workers(self) -> None:
        with self._lost_with_ray():
            self._allotment = allot(self.cluster, model_device=self.model.device)
            self._head, self._telemetry = HeadWatch(self.cluster.address), Telemetry()
            self._own = PoolShare(self, self.task)
            self._slots = [self._new_slot(number) for number in range(self._allotment.workers)]
            for slot in tuple(self._slots):
                self._step_of_first_start(slot)  # placed, and loading from now on: all at the same time
            for position in range(len(self._slots)):
                while self._slots[position].stage != "ready":
                    self._step_of_first_start(self._slots[position])
        self._started = True

    def close(self, reason: ClusterError | None = None) -> None:
        """Stop all workers, and the cluster if this pool started it. Unfinished requests are dropped.

        Other threads that wait for results get the ``reason``, a ClusterLost where there is none.
        """
        with self._lock:
            closed = reason or ClusterLost("the pool was closed while requests were running")
            self._ended = self._ended or closed
            self._queue.clear()
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._watched, 2 * LONGEST_WAIT_SECONDS)
            for slot in self._slots:
                self._kill(slot)
            self._slots = []
        if self._owns_connection:
            self._owns_connection = False
            disconnect()

    @property
    def info(self) -> tuple[WorkerInfo, ...]:
        """Descriptions of the workers that are ready."""
        return tuple(slot.info for slot in self._slots if slot.info is not None)

    @property
    def size(self) -> int:
        """Number of workers, those being replaced included."""
        return len(self._slots)

    @property
    def idle(self) -> bool:
        """Whether every worker is ready and nothing is asked of any."""
        asked = self._queue or self._finished or any(slot.reference is not None for slot in self._slots)
        return bool(self._slots) and not asked

    def take_retries(self) -> int:
        """Return how many requests went to another worker since the last call."""
        return self._own.take_retries()

    def share(self, task: Task) -> PoolShare:
        """Give a job its share of the workers, about its own task; other jobs have theirs at the same time."""
        share = PoolShare(self, task)
        with self._lock:
            self._shares.append(share)
        return share

    def end_share(self, share: PoolShare) -> None:
        """End a job's share; workers drop its task when they take up another."""
        with self._lock:
            self._shares = [each for each in self._shares if each is not share]

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in every thread that waits for results, now or later."""
        with self._lock:
            self._interrupted = True
            self._lock.notify_all()

    @property
    def pending(self) -> int:
        """Requests submitted whose result :meth:`next_done` has not handed out yet."""
        asked = [*self._queue, *(slot.ticket for slot in self._slots if slot.ticket is not None)]
        return sum(ticket.results is self._finished for ticket in asked) + len(self._finished)

    def submit(self, request: Request) -> int:
        """Queue a request for :meth:`next_done`, starting it if a worker is free; return its number."""
        with self._lock:
            (number,) = self._submit([request], self._own, self._finished)
        return number

    def next_done(self, timeout: float | None = None) -> tuple[int, Result] | None:
        """Wait for any submitted request to finish; return its number and result.

        Returns None when nothing is pending, or nothing finished within ``timeout`` seconds.

        Raises:
            ClusterError: no worker is left and none can be started.
        """
        if not self.pending:
            return None
        return self._next(self._finished, None if timeout is None else time.monotonic() + timeout)

    def run(self, requests: Iterable[Request], share: PoolShare | None = None) -> Iterator[tuple[int, Result]]:
        """Do all requests, of the pool's own task or of a ``share``; yield the index of each and its result.

        Several threads may do so at the same time. Requests that no worker has begun are dropped where the iterator is
        closed early.

        Raises:
            ClusterError: as :meth:`next_done`.
        """
        results: deque[tuple[int, Result]] = deque()
        with self._lock:
            indices = {
                number: index for index, number in enumerate(self._submit(requests, share or self._own, results))
            }
        try:
            while indices:
                done = self._next(results)
                assert done is not None
                number, result = done
                yield indices.pop(number), result
        finally:
            if indices:
                with self._lock:
                    self._queue = deque(ticket for ticket in self._queue if ticket.results is not results)

    def _submit(self, requests: Iterable[Request], share: PoolShare, results: deque[tuple[int, Result]]) -> list[int]:
        tickets = [Ticket(self._tickets + place, request, share, results) for place, request in enumerate(requests)]
        self._tickets += len(tickets)
        self._queue += tickets
        if self._ended is None:  # who waits for the results is told why otherwise
            self._dispatch()
        return [ticket.number for ticket in tickets]

    def _next(self, results: deque[tuple[int, Result]], give_up: float | None = None) -> tuple[int, Result] | None:
        """Wait until ``results`` has one; None where it has none at the time to give up."""
        with self._lock:
            self._callers += 1
            try:
                while not results:
                    if self._interrupted:
                        raise KeyboardInterrupt
                    if self._ended is not None:
                        raise type(self._ended)(str(self._ended))
                    if give_up is not None and time.monotonic() >= give_up:
                        return None
                    if self._watched:
                        self._lock.wait(None if give_up is None else max(0.0, give_up - time.monotonic()))
                    else:
                        self._watch(give_up)
                if self._ended is None:
                    self._dispatch()  # what the caller does with the result must not keep the worker waiting
                return results.popleft()
            finally:
                self._callers -= 1

    def _watch(self, give_up: float | None) -> None:
        """Look after the workers once, until one has answered or a moment has passed."""
        self._watched = True
        try:
            with self._lost_with_ray():
                self._look_at_cluster()
                self._dispatch()
                self._wait(give_up)
                self._replace_overdue()
        except ClusterError as error:
            self._ended = self._ended or error
            raise
        finally:
            self._watched = False
            self._lock.notify_all()

    # Handing out ------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Hand out what is queued, in order, as far as workers are idle.

        Requests that need their device alone come first, since others must wait for them: each takes an idle device,
        or closes one to further requests until it is idle. While a worker starts, which may be on any device, they
        wait without that.
        """
        if not self._queue:
            return
        closed = {slot.device for slot in self._slots if slot.needs_device_alone}
        waiting: deque[Ticket] = deque()
        starting = any(slot.info is None for slot in self._slots)
        for ticket in [each for each in self._queue if each.alone and not starting]:
            slot = self._alone_on_device(closed)
            if slot is not None:
                self._queue.remove(ticket)
                self._hand_out(ticket, slot)
        idle = deque(slot for slot in self._slots if slot.reference is None and slot.device not in closed)
        while self._queue:
            ticket = self._queue.popleft()
            if ticket.alone or not idle:
                waiting.append(ticket)
            else:
                self._hand_out(ticket, idle.popleft())
        self._queue = waiting

    def _alone_on_device(self, closed: set[str]) -> Slot | None:
        """Close the least busy of the open devices; return one of its workers if all of them are idle."""
        busy: dict[str, int] = {}
        for slot in self._slots:
            if slot.device not in closed:
                busy[slot.device] = busy.get(slot.device, 0) + (slot.reference is not None)
        if not busy:
            return None
        device = min(busy, key=lambda name: busy[name])
        closed.add(device)
        return None if busy[device] else next(slot for slot in self._slots if slot.device == device)

    def _hand_out(self, ticket: Ticket, slot: Slot) -> None:
        slot.ticket = ticket
        ticket.attempts += 1
        in_use = frozenset(share.key for share in self._shares) or {self._own.key}
        task = TaskReference(ticket.share.key, [ticket.share.reference], frozenset(in_use))
        slot.call(slot.actor.handle.remote(ticket.request, task), self.cluster.request_timeout_seconds)

    def _wait(self, give_up: float | None) -> None:
        flying = {slot.reference: slot for slot in self._slots if slot.reference is not None}
        if not flying:
            raise ClusterLost("no worker is left to do the remaining requests")
        now = time.monotonic()
        moments = [slot.deadline for slot in flying.values()] + ([] if give_up is None else [give_up])
        longest = LONGEST_WAIT_SECONDS if self._callers < 2 else SHARED_WAIT_SECONDS
        patience = min(max(0.0, min(moments) - now), longest)
        self._lock.release()
        try:
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=patience)
            if ready:
                # Those that are ready as well: none of their workers should wait for what is done with this one.
                ready, _ = ray.wait(list(flying), num_returns=len(flying), timeout=0)
        finally:
            self._lock.acquire()
        for reference in ready if self._ended is None else ():
            self._collect(flying[reference])

    # Taking back ------------------------------------------------------------------------------------------------

    def _collect(self, slot: Slot) -> None:
        try:
            value = ray.get(slot.reference)
        except RayTaskError as error:
            self._raised(slot, error.cause)
        except RayError as error:
            self._lost(slot, describe_death(error))
        else:
            self._returned(slot, value)

    def _returned(self, slot: Slot, value: Any) -> None:
        slot.reference = None
        if slot.stage == "placing":
            slot.load(slot.actor.setup.remote(), self.cluster.load_timeout_seconds)
        elif slot.ticket is None:
            self._ready(slot, value)
        else:
            self._telemetry.answered(slot.ticket.kind, "done")
            slot.ticket.results.append((slot.ticket.number, value))
            slot.ticket = None

    def _raised(self, slot: Slot, cause: BaseException) -> None:
        """Fail the request whose call raised; the worker lives on, and trying again would give the same error."""
        reason = describe_error(cause)
        if slot.ticket is None:
            self._lost(slot, reason)
            return
        slot.reference = None
        self._fail(slot.ticket, reason)
        slot.ticket = None

    def _lost(self, slot: Slot, reason: str) -> None:
        """Replace a worker that is gone or could not load the model, and give its request to another."""
        # Where the whole node goes, its workers go first, and neither they nor their requests are to blame. What would
        # be asked of Ray meanwhile could end this process.
        time.sleep(NOTICE_SECONDS)
        self.check_cluster(counts=False)
        self._kill(slot)
        self._telemetry.lost(slot.number, reason)
        ticket = slot.ticket
        if ticket is None:
            slot.failed_starts += 1
        elif ticket.attempts >= self.cluster.max_attempts:
            self._fail(ticket, reason)
        else:
            ticket.share.retries += 1
            self._telemetry.retried(ticket.kind, reason)
            self._queue.appendleft(ticket)
        if slot.failed_starts < FAILED_STARTS:
            self._slots[self._slots.index(slot)] = self._new_slot(slot.number, slot.failed_starts)
        else:
            self._give_up(slot, reason)

    def _give_up(self, slot: Slot, reason: str) -> None:
        """Go on without a worker, if any other is left."""
        self._kill(slot)
        self._slots.remove(slot)
        if slot.stage == "loading":
            self._no_new_workers_before = time.monotonic() + PAUSE_SECONDS
        log("worker_given_up", worker=slot.number, reason=reason, left=len(self._slots))
        if not self._slots:
            raise ClusterLost(f"no worker is left; the last one failed: {reason}")

    def _fail(self, ticket: Ticket, reason: str) -> None:
        self._telemetry.answered(ticket.kind, "failed")
        log("request_failed", kind=ticket.kind, attempts=ticket.attempts, reason=reason)
        ticket.results.append((ticket.number, Failure(ticket.request, reason, ticket.attempts)))

    def _replace_overdue(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot in self._slots if slot.reference is not None and slot.deadline <= now]:
            if slot.stage == "placing":
                self._give_up(slot, f"the cluster had no room for it within {PLACING_SECONDS:g} s")
                continue
            what = "load the model" if slot.ticket is None else "answer"
            seconds = self.cluster.load_timeout_seconds if slot.ticket is None else self.cluster.request_timeout_seconds
            self._lost(slot, f"the worker took longer than {seconds:g} s to {what}")

    def _look_at_cluster(self, *, welcome: bool = True) -> None:
        """Check now and then that the cluster is still there, and start workers that it has room for again."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        self.check_cluster()
        if welcome and now >= self._no_new_workers_before and self._head.steady:
            self._add_workers()

    def check_cluster(self, *, counts: bool = True) -> None:
        """Make sure that the cluster is there; ``counts`` as for :meth:`HeadWatch.check`. Raises ClusterLost."""
        with self._lost_with_ray():
            self._head.check(counts=counts)

    @contextmanager
    def _lost_with_ray(self) -> Iterator[None]:
        try:
            yield
        except (RayError, ConnectionError) as error:
            reason = describe_error(error)
            raise ClusterLost(f"cluster {self.cluster.address}: cannot be used any more: {reason}") from None

    def _add_workers(self) -> None:
        wanted = self.cluster.workers or room(self._allotment)
        missing = 0 if wanted == UNLIMITED else wanted - len(self._slots)
        if missing <= 0 or any(slot.stage == "placing" for slot in self._slots):
            return
        taken = {slot.number for slot in self._slots}
        numbers = (number for number in range(wanted) if number not in taken)
        for number, _ in zip(numbers, range(self._allotment.fits_in(ray.available_resources())), strict=False):
            self._slots.append(self._new_slot(number))
            log("worker_joins", worker=number, workers=len(self._slots))

    # Workers ----------------------------------------------------------------------------------------------------

    def _new_slot(self, number: int, failed_starts: int = 0) -> Slot:
        cluster, each = self.cluster, self._allotment
        settings = WorkerSettings(number, cluster.threads, gpus=math.ceil(each.gpus), batch_size=cluster.batch_size)
        resources = {"num_cpus": each.cpus, "num_gpus": each.gpus, "memory": each.memory or None}
        shell: Any = ray.remote(self._worker).options(**resources, max_restarts=0, max_task_retries=0)
        model = replace(self.model, dtype=self.dtype) if self.dtype else self.model  # all as the first resolved auto
        actor = shell.remote(model, self._own.reference, settings)
        deadline = time.monotonic() + PLACING_SECONDS
        return Slot(number, actor, actor.place.remote(), deadline, failed_starts=failed_starts)

    def _step_of_first_start(self, slot: Slot) -> None:
        """Wait until a worker of the first set is placed, or has loaded.

        One that dies is replaced, a few times; unlike a replacement's later, its failure is an error of the whole pool.
        """
        patience = self.cluster.load_timeout_seconds if slot.stage == "placing" else slot.deadline - time.monotonic()
        give_up = time.monotonic() + patience
        while True:
            left = max(0.0, give_up - time.monotonic())
            ready, _ = ray.wait([slot.reference], timeout=min(left, LONGEST_WAIT_SECONDS))
            if ready or left == 0.0:
                break
            self._look_at_cluster(welcome=False)
        if not ready:
            free = ray.available_resources()
            raise ClusterError(
                f"worker {slot.number} was not ready after {self.cluster.load_timeout_seconds:g} s; it needs "
                f"{self._allotment.cpus:g} CPUs and {self._allotment.gpus:g} GPUs, of which "
                f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free in the cluster"
            )
        try:
            value = ray.get(slot.reference)
        except RayTaskError as error:
            if isinstance(error.cause, WorkersError):
                raise error.cause from None
            raise ClusterError(f"worker {slot.number} could not start: {describe_error(error.cause)}") from None
        except RayError as error:
            if slot.failed_starts + 1 < FAILED_STARTS:
                self._lost(slot, describe_death(error))
                return
            raise ClusterError(
                f"worker {slot.number} could not load the model: {describe_death(error)}; memory is needed for "
                f"{self._allotment.workers} models (cluster.workers), and skipplan must be installed on every node"
            ) from None
        self._returned(slot, value)

    def _ready(self, slot: Slot, info: WorkerInfo) -> None:
        self.fingerprint = self.fingerprint or info.fingerprint
        if info.fingerprint != self.fingerprint:
            other = f"fingerprint {info.fingerprint[:12]}, not {self.fingerprint[:12]}"
            reason = f"it holds another model than the others ({other}): {self.model.path} differs between nodes"
            self._refuse(slot, info, reason, starts=1)
            return
        self.dtype = self.dtype or info.dtype
        if info.dtype != self.dtype:
            reason = f"it would compute in {info.dtype}, where the first worker computes in {self.dtype}"
            self._refuse(slot, info, reason, starts=FAILED_STARTS)
            return
        slot.info, slot.failed_starts, slot.stage = info, 0, "ready"
        ready = len(self.info)
        self._telemetry.count(ready)
        about = {"node": info.node, "device": info.device, "dtype": info.dtype, "process": info.process}
        log("worker_ready", worker=info.worker, workers=ready, **about)

    def _refuse(self, slot: Slot, info: WorkerInfo, reason: str, *, starts: int) -> None:
        """Replace a worker unlike the others; of the first set, raise ClusterError after so many starts of it."""
        if not self._started and slot.failed_starts + 1 >= starts:
            raise ClusterError(f"worker {info.worker} on {info.node}: {reason}")
        self._lost(slot, reason)

    def _kill(self, slot: Slot) -> None:
        if ray.is_initialized():
            ray.kill(slot.actor, no_restart=True)
