"""Who gets the pool of a service next, and whose failure ends it; the pools are stand-ins without workers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import in_process
import pytest

from optimizer.errors import LeaseLost
from optimizer.service import pool as pools
from optimizer.service.pool import PoolCache, cluster_settings, model_source
from optimizer.service.runner import process
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs, leases
from workers.errors import ClusterError


class Workers:
    """What the cache sees of a pool."""

    idle = True

    def __init__(self, inputs: Any) -> None:
        self.cluster, self.model, self.fingerprint = cluster_settings(inputs), model_source(inputs.spec), "f" * 64
        self.closed = 0
        self.reasons: list[str] = []

    def check_cluster(self) -> None:
        """The cluster is there."""

    def share(self, task: Any) -> Any:
        return SimpleNamespace(close=lambda: None, of=self)

    def close(self, reason: ClusterError | None) -> None:
        self.closed += 1
        self.reasons.append(str(reason))


def wanted() -> None:
    """The job is."""


def inputs(batch_size: int) -> Any:
    cluster = {"workers": 1, "batch_size": batch_size}
    return SimpleNamespace(spec=in_process.spec(cluster=cluster), task=None, fingerprint="")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> PoolCache:
    monkeypatch.setattr(pools, "_start", Workers)
    monkeypatch.setattr(pools, "check_plan_space", lambda inputs, pool: None)
    monkeypatch.setattr(pools, "WAIT_SECONDS", 0.02)
    return PoolCache(lambda function: function())  # type: ignore[arg-type]


def test_a_failed_job_ends_the_pool_that_it_was_lent_before_others_start_one_and_no_other(cache: PoolCache) -> None:
    with pytest.raises(ClusterError), cache.lent() as lend_first:
        first = lend_first(inputs(8), wanted).of  # type: ignore[attr-defined]
        with pytest.raises(ClusterError), cache.lent() as lend_second:
            assert lend_second(inputs(8), wanted).of is first  # type: ignore[attr-defined]
            raise ClusterError("no worker is left")
        assert first.closed == 1 and first.reasons == ["no worker is left"]  # what others who wait are told
        raise ClusterError("the cluster has ended")
    assert first.closed == 1
    with cache.lent() as lend:
        other = lend(inputs(16), wanted).of  # type: ignore[attr-defined]
        with pytest.raises(ClusterError), cache.lent():
            raise ClusterError("it was lent none")
        assert other is not first and other.closed == 0


def test_a_job_stops_waiting_while_the_pool_of_another_one_starts(
    cache: PoolCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, goes_on = threading.Event(), threading.Event()

    def start(wanted_by: Any) -> Workers:
        starts.set()
        assert goes_on.wait(20)
        return Workers(wanted_by)

    monkeypatch.setattr(pools, "_start", start)
    lent: list[Any] = []

    def first() -> None:
        with cache.lent() as lend:
            lent.append(lend(inputs(8), wanted))

    def cancelled() -> None:
        raise LeaseLost("cancelled")

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    assert starts.wait(20)
    with pytest.raises(LeaseLost), cache.lent() as lend:
        lend(inputs(16), cancelled)
    assert not lent  # the first one's pool has not started yet
    goes_on.set()
    thread.join(20)
    assert len(lent) == 1


def test_a_job_waits_for_one_that_came_before_it_and_waits(cache: PoolCache) -> None:
    order: list[str] = []

    def job(name: str, batch_size: int) -> threading.Thread:
        def work() -> None:
            with cache.lent() as lend:
                lend(inputs(batch_size), wanted)
                order.append(name)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    with cache.lent() as lend:
        lend(inputs(8), wanted)
        suits = job("suits and is the next", 8)
        suits.join(10)
        other = job("needs another", 16)
        other.join(0.3)
        last = job("suits, but came later", 8)
        last.join(0.5)
        assert order == ["suits and is the next"]
    for thread in (other, last):
        thread.join(10)
    assert order == ["suits and is the next", "needs another", "suits, but came later"]


def test_a_job_that_waits_for_other_workers_ends_when_it_is_cancelled(cache: PoolCache, db: Database) -> None:
    number = jobs.submit(db, {}, "hash").id
    waiting = leases.claim(db, "me", 60, number)
    assert waiting is not None
    with cache.lent() as lend:
        lend(inputs(8), wanted)
        threading.Timer(0.3, lambda: jobs.cancel(db, number)).start()
        with pytest.raises(LeaseLost, match=f"job {number} was cancelled"), cache.lent() as lend_other:
            process(db, waiting, Progress(), lambda still_held: lend_other(inputs(16), still_held), lease_seconds=1.0)
        with cache.lent() as lend_next:  # no longer in the way of those that suit
            lend_next(inputs(8), wanted)
    assert jobs.get(db, number).state == "cancelled"
