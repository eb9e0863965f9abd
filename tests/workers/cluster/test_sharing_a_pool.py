"""Several threads with one pool, and requests that need a device alone: who runs beside whom."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
import ray

from workers.cluster.actor import TaskReference
from workers.cluster.pool import WorkerPool
from workers.cluster.settings import ClusterSettings, WorkerSettings
from workers.errors import ClusterError
from workers.messages import Alone, CompareLatency, EvaluatePlans, ModelSource, Request, WorkerInfo
from workers.tasks import Task, load_spec, load_task

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers' processes cannot import this file

WORKERS, DEVICES = 4, 2


@dataclass(frozen=True)
class Slept:
    """When a worker answered which request, by a clock that all processes share, and on which device."""

    request: Request
    device: int
    began: float
    ended: float

    def overlaps(self, other: Slept) -> bool:
        return self.began < other.ended and other.began < self.ended


class Sleeper:
    """Sleeps as long as a request says; two workers a device."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        self._number = settings.worker

    def place(self) -> None:
        pass

    def setup(self) -> WorkerInfo:
        device = f"device {self._number % DEVICES}"
        about = WorkerInfo(self._number, "here", "none", 1, "llava", "f" * 64, 2, ("RS", "RS"), 0, "none", os.getpid())
        return WorkerInfo(**{**vars(about), "device_id": device})

    def handle(self, request: Request, task: TaskReference) -> Slept:
        began = time.monotonic()
        time.sleep(float(request.plan if isinstance(request, CompareLatency) else request.plans[0]))
        return Slept(request, self._number % DEVICES, began, time.monotonic())


def evaluate(seconds: float) -> EvaluatePlans:
    return EvaluatePlans((str(seconds),), "search")


@pytest.fixture(scope="module")
def pool(ray_cluster: None, tiny_directory: Path) -> Iterator[WorkerPool]:
    task = load_task(load_spec("easy-vqa").with_splits(calibration=1, search=1, held_out=1))
    settings = ClusterSettings(workers=WORKERS, cpus_per_worker=0.0)
    with WorkerPool(settings, ModelSource(str(tiny_directory)), task, worker=Sleeper) as pool:
        yield pool


def test_measurements_are_alone_on_their_device_and_other_devices_go_on(pool: WorkerPool) -> None:
    requests = [evaluate(0.3)] * 4 + [CompareLatency("0.6")] * 3 + [evaluate(0.3)] * 4
    slept = [result for _, result in pool.run(requests)]
    assert all(isinstance(each, Slept) for each in slept) and len(slept) == len(requests)
    beside = [(one, two) for one, two in combinations(slept, 2) if one.overlaps(two)]  # type: ignore[union-attr, arg-type]
    for one, two in beside:
        if isinstance(one.request, Alone) or isinstance(two.request, Alone):
            assert one.device != two.device  # type: ignore[union-attr]
    timed = [pair for pair in beside if all(isinstance(each.request, Alone) for each in pair)]
    assert timed, "two measurements run at the same time, on two devices"
    mixed = [pair for pair in beside if sum(isinstance(each.request, Alone) for each in pair) == 1]
    assert mixed, "the other device goes on while one measures"


def test_threads_share_the_workers_and_each_gets_its_own_results(pool: WorkerPool) -> None:
    found: dict[float, list[tuple[int, float]]] = {}

    def ask(seconds: float) -> None:
        replies = pool.run([evaluate(seconds)] * 6)
        found[seconds] = [(index, float(reply.request.plans[0])) for index, reply in replies]  # type: ignore[union-attr]

    threads = [threading.Thread(target=ask, args=(seconds,)) for seconds in (0.21, 0.22, 0.23)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - began < 3.0  # 18 requests on four workers: 1.1 s, and 4 s on one
    for seconds in (0.21, 0.22, 0.23):
        assert sorted(index for index, _ in found[seconds]) == list(range(6))
        assert {answered for _, answered in found[seconds]} == {seconds}
    assert pool.idle


def test_requests_that_nobody_waits_for_any_more_are_dropped(pool: WorkerPool) -> None:
    results = pool.run([evaluate(0.1)] * 4 + [evaluate(30.0)] * 20)
    for _ in range(4):
        next(results)
    results.close()
    assert not pool._queue  # those that run go on


def test_a_pool_that_has_ended_hands_nothing_out(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [slot.ticket for slot in pool._slots]  # the last test's requests may still run
    monkeypatch.setattr(pool, "_ended", ClusterError("all workers are lost"))
    with pytest.raises(ClusterError, match="all workers are lost"):
        next(pool.run([evaluate(0.1)]))
    assert not pool._queue and [slot.ticket for slot in pool._slots] == before


def test_who_waits_for_a_pool_that_is_closed_is_told(pool: WorkerPool) -> None:
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            list(pool.run([evaluate(30.0)]))
        except ClusterError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while sum(slot.ticket is not None for slot in pool._slots) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pool.close()
    for thread in threads:
        thread.join(20)
    assert [str(error) for error in errors] == ["the pool was closed while requests were running"] * 2
