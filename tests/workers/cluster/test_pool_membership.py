"""Workers that leave and join while requests run, with workers that only sleep: what counts is who gets what."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from workers.cluster import pool as pools
from workers.cluster.actor import TaskReference
from workers.cluster.connection import MISSED_CALLS, HeadWatch
from workers.cluster.pool import WorkerPool
from workers.cluster.settings import ClusterSettings, WorkerSettings
from workers.cluster.share import PoolShare
from workers.errors import ClusterError, ClusterLost, ModelError
from workers.messages import EvaluatePlans, Evaluation, Evaluations, Failure, ModelSource, WorkerInfo
from workers.tasks import Task, load_spec, load_task

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers' processes cannot import this file


class Sleeper:
    """Says which task it holds and which process it is, after as many seconds as the request's n_samples says."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        self._task, self._number = task, settings.worker

    def place(self) -> None:
        pass

    def setup(self) -> WorkerInfo:
        return WorkerInfo(self._number, "here", "none", 1, "llava", "f" * 64, 2, ("RS", "RS"), 0, "none", os.getpid())

    def handle(self, request: EvaluatePlans, task: TaskReference) -> Evaluations:
        time.sleep(request.n_samples or 0)
        label = f"{len(ray.get(task.reference[0]).search)} samples"
        return Evaluations((Evaluation(request.plans[0], label, (), (1.0,), {}, {}, float(os.getpid())),))


class Fragile(Sleeper):
    """Dies in its first start; its replacement lives."""

    def setup(self) -> WorkerInfo:
        mark = Path(os.environ["FRAGILE_MARK"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().setup()


class Changed(Sleeper):
    """Holds another model where it replaces a worker: the files of its node are others by then."""

    def setup(self) -> WorkerInfo:
        mark = Path(os.environ["CHANGED_MARK"]) / str(self._number)
        info = super().setup() if not mark.exists() else replace(super().setup(), fingerprint="0" * 64)
        mark.touch()
        return info


class Unable(Sleeper):
    """Finds its model wrong."""

    def setup(self) -> WorkerInfo:
        raise ModelError("architecture 'llama' is none")


@ray.remote(num_cpus=1, max_restarts=0)
class Neighbour:
    """Somebody else's actor, which takes a CPU as soon as one is free."""

    def there(self) -> bool:
        return True


def small_task(search: int) -> Task:
    return load_task(load_spec("easy-vqa").with_splits(calibration=1, search=search, held_out=1))


def build(
    tiny_directory: Path, worker: type = Sleeper, workers: int | None = None, **settings_of_requests: Any
) -> WorkerPool:
    settings = ClusterSettings(workers=workers, cpus_per_worker=1.0, **{"max_attempts": 5} | settings_of_requests)
    return WorkerPool(settings, ModelSource(str(tiny_directory)), small_task(4), worker=worker)


@pytest.fixture
def pool(ray_cluster: None, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    monkeypatch.setattr(pools, "PLACING_SECONDS", 3.0)
    monkeypatch.setattr(pools, "LOOK_SECONDS", 0.2)
    with build(tiny_directory) as pool:
        yield pool


def answers(pool: WorkerPool | PoolShare, seconds: list[int]) -> list[Evaluation]:
    found = {}
    for number, reply in pool.run([EvaluatePlans(("RR",), "search", limit) for limit in seconds]):
        assert not isinstance(reply, Failure), reply.reason
        assert isinstance(reply, Evaluations)
        (found[number],) = reply.results
    return [found[number] for number in sorted(found)]  # type: ignore[return-value]


def test_a_worker_without_room_is_done_without_and_comes_back_when_there_is(pool: WorkerPool) -> None:
    assert pool.size == 2  # workers: auto, on two CPUs
    neighbour = Neighbour.remote()
    numbers = [pool.submit(EvaluatePlans(("RR",), "search", 1)) for _ in range(4)]
    os.kill(pool.info[0].process, signal.SIGKILL)
    assert ray.get(neighbour.there.remote(), timeout=60)  # the dead one's CPU is taken
    done = [pool.next_done(timeout=60) for _ in numbers]
    assert all(each is not None and isinstance(each[1], Evaluations) for each in done)
    deadline = time.monotonic() + 60
    while pool.size == 2 and time.monotonic() < deadline:
        answers(pool, [1])
    assert pool.size == 1
    assert pool.take_retries() == 1 and pool.take_retries() == 0

    ray.kill(neighbour)
    while len(pool.info) < 2 and time.monotonic() < deadline + 60:
        answers(pool, [1])
    assert len({each.seconds for each in answers(pool, [1, 1])}) == 2  # both work at the same time


def test_jobs_with_tasks_of_their_own_share_a_pool(pool: WorkerPool) -> None:
    before = {info.process for info in pool.info}
    tasks = [small_task(4), small_task(7)]
    with pool.share(tasks[0]) as first, pool.share(tasks[1]) as second:
        both = [answers(share, [0, 0]) for share in (first, second, first)]
        assert first.size == second.size == 2 and first.info == pool.info
    labels = [{each.split for each in found} for found in both]
    assert labels == [{f"{len(tasks[number].search)} samples"} for number in (0, 1, 0)] and labels[0] != labels[1]
    assert {info.process for info in pool.info} == before


def test_a_killed_worker_is_replaced_and_its_request_still_answered(pool: WorkerPool) -> None:
    before = {info.process for info in pool.info}
    numbers = [pool.submit(EvaluatePlans(("RR",), "search", 1)) for _ in range(3)]
    os.kill(pool.info[0].process, signal.SIGKILL)
    results = {}
    while pool.pending:
        done = pool.next_done()
        assert done is not None
        results[done[0]] = done[1]
    assert sorted(results) == sorted(numbers)
    assert all(isinstance(result, Evaluations) for result in results.values())
    deadline = time.monotonic() + 60
    while len(pool.info) < 2 and time.monotonic() < deadline:
        answers(pool, [1])
    assert len(pool.info) == 2 and len({info.process for info in pool.info} - before) == 1


def test_a_model_that_only_the_worker_can_find_wrong_is_one_clear_error(
    ray_cluster: None, tiny_directory: Path
) -> None:
    with pytest.raises(ModelError, match="architecture 'llama' is none") as caught:
        build(tiny_directory, Unable, workers=1).start()
    assert "\n" not in str(caught.value) and not isinstance(caught.value, ray.exceptions.RayTaskError)


ENDLESS = EvaluatePlans(("RR",), "search", 600)


def test_what_ray_says_about_a_death_is_logged_and_not_printed(
    pool: WorkerPool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("workers.cluster.telemetry")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            pool.submit(EvaluatePlans(("RR",), "search", 1))
            os.kill(pool.info[0].process, signal.SIGKILL)
            assert pool.next_done() is not None
            deadline = time.monotonic() + 300
            while "cluster_message" not in caplog.messages and time.monotonic() < deadline:
                time.sleep(0.1)
    finally:
        logger.removeHandler(caplog.handler)
    said = [record.fields["text"] for record in caplog.records if record.message == "cluster_message"]  # type: ignore[attr-defined]
    assert said and all("died" in text for text in said) and capsys.readouterr().out == ""


def test_a_request_that_keeps_killing_its_worker_is_given_up(ray_cluster: None, tiny_directory: Path) -> None:
    with build(tiny_directory, workers=1, max_attempts=2) as pool:
        number, killed, result = pool.submit(ENDLESS), set[int](), None
        deadline = time.monotonic() + 300
        while result is None and time.monotonic() < deadline:
            for info in pool.info:
                if info.process not in killed:
                    killed.add(info.process)
                    os.kill(info.process, signal.SIGKILL)
            result = pool.next_done(timeout=0.5)
        assert result is not None and result[0] == number and isinstance(result[1], Failure)
        assert result[1].request == ENDLESS and result[1].attempts == 2 == len(killed)
        assert "process died" in result[1].reason
        assert answers(pool, [0])[0].plan == "RR"


def test_a_request_that_takes_too_long_is_given_up(ray_cluster: None, tiny_directory: Path) -> None:
    with build(tiny_directory, workers=1, max_attempts=1, request_timeout_seconds=2.0) as pool:
        first = pool.info[0].process
        ((_, result),) = pool.run([ENDLESS])
        assert isinstance(result, Failure) and "longer than 2 s to answer" in result.reason
        assert answers(pool, [0])[0].plan == "RR"
        assert pool.info[0].process != first
    with pytest.raises(ProcessLookupError):  # a worker given up is stopped, not left running
        wait_for_end(first)


def test_a_replacement_of_another_model_ends_no_job_and_the_last_workers_end_tells_all_of_them(
    ray_cluster: None, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "FAILED_STARTS", 1)

    class Marked(Changed):
        def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
            os.environ["CHANGED_MARK"] = str(tmp_path)
            super().__init__(model, task, settings)

    errors: list[BaseException] = []

    def ask(share: PoolShare) -> None:
        try:
            answers(share, [600])
        except ClusterError as error:
            errors.append(error)

    with build(tiny_directory, Marked, workers=2) as pool:
        first, second = (info.process for info in pool.info)
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while pool.size == 2 and time.monotonic() < deadline:
            answers(pool, [1])
        assert [info.process for info in pool.info] == [second]  # the replacement is given up, and nothing else
        threads = [threading.Thread(target=ask, args=(pool.share(small_task(size)),)) for size in (4, 7)]
        for thread in threads:
            thread.start()
        while pool.info and pool._slots[0].ticket is None:
            time.sleep(0.05)
        os.kill(second, signal.SIGKILL)
        for thread in threads:
            thread.join(60)
    assert [type(error) for error in errors] == [ClusterLost] * 2
    reasons = {str(error) for error in errors}
    assert len(reasons) == 1 and "the last one failed: it holds another model than the others" in reasons.pop()


def wait_for_end(process: int) -> None:
    for _ in range(100):
        os.kill(process, 0)
        time.sleep(0.05)


def test_a_worker_that_dies_while_the_first_set_loads_is_replaced(
    ray_cluster: None, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "died"

    class Marked(Fragile):
        def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
            os.environ["FRAGILE_MARK"] = str(mark)
            super().__init__(model, task, settings)

    with build(tiny_directory, Marked, workers=1) as pool:
        assert mark.exists() and pool.size == len(pool.info) == 1
        assert answers(pool, [0])[0].plan == "RR"


class OtherNodes(Sleeper):
    """Resolves ``auto`` as a node with a processor of its own: the first worker's and the second's differ."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        super().__init__(model, task, settings)
        own = "bfloat16" if settings.worker == 0 else "float32"
        self._dtype = own if model.dtype == "auto" else model.dtype

    def setup(self) -> WorkerInfo:
        return replace(super().setup(), dtype=self._dtype)


class Stubborn(OtherNodes):
    """Computes in what its node computes in, whatever is asked for."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        super().__init__(replace(model, dtype="auto"), task, settings)


def test_all_workers_compute_in_what_auto_is_on_the_first(
    ray_cluster: None, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(tiny_directory, OtherNodes, workers=2) as pool:
        assert [info.dtype for info in pool.info] == ["bfloat16", "bfloat16"] and pool.dtype == "bfloat16"
        assert [each.plan for each in answers(pool, [0, 0])] == ["RR", "RR"]
    monkeypatch.setattr(pools, "FAILED_STARTS", 1)
    with pytest.raises(ClusterError, match="would compute in float32, where the first worker computes in bfloat16"):
        build(tiny_directory, Stubborn, workers=2).start()


def test_memory_is_among_what_a_cluster_may_lack(ray_cluster: None, tiny_directory: Path) -> None:
    settings = ClusterSettings(workers=2, cpus_per_worker=0.5, memory_per_worker=50_000)
    with pytest.raises(ClusterError, match=r"need 100000 GiB of memory, the cluster has [\d.]+; missing"):
        WorkerPool(settings, ModelSource(str(tiny_directory)), small_task(4)).start()


def test_a_worker_does_not_span_nodes(ray_cluster: None, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"Alive": True, "Resources": {"CPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [half, half, {"Alive": False, "Resources": {"CPU": 8.0}}])
    settings = ClusterSettings(workers=1, cpus_per_worker=2.0)
    with pytest.raises(ClusterError, match="as much in all, but its nodes have room for 0 such workers only"):
        WorkerPool(settings, ModelSource(str(tiny_directory)), small_task(4)).start()


def test_a_head_that_stays_away_is_an_error_and_one_that_comes_back_is_not(ray_cluster: None) -> None:
    watch = HeadWatch("local")
    watch.check()
    there = watch._head
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"127.0.0.1:{closed.getsockname()[1]}"
    for _ in range(2):
        watch._head = away
        for _ in range(MISSED_CALLS - 1):
            watch.check()
        assert not watch.steady
        watch._head = there
        watch.check()
        assert watch.steady
    watch._head = away
    with pytest.raises(ClusterError, match="its head node does not answer any more"):
        for _ in range(MISSED_CALLS):
            watch.check()
