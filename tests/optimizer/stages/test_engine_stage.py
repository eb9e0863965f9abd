"""A job that names an engine: what it published, what it is judged by, and what is asked of the workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import in_process
import pytest
from scripted_engine import ScriptedEngine

from optimizer import engine_latencies
from optimizer.errors import NoFeasiblePlan
from optimizer.job.best import find_best
from optimizer.stages import engine_latency, publish
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.pipeline import check_begun_alike
from optimizer.stages.verify import Chosen, Finalist
from optimizer.verification.verdict import verify
from storage.database import Database
from storage.errors import NotFound
from storage.records import plans
from storage.records.plans import PlanQuery
from workers.engines.interface import ENGINES, Installed
from workers.errors import EngineAbsent
from workers.messages import CompareEngineLatency, Failure, FindEngine, LatencyComparison, Reply, Request, Workload

PLAN = "R" * 6 + "S" * 6
JOB: dict[str, Any] = {
    "actions": ["skip"],
    "latency": {"engine": "scripted", "precision": 0.5, "max_seconds": 2},
    "workload": {"new_tokens": 2, "concurrency": 2},
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    scripted = ScriptedEngine(layer_seconds=0.004)
    monkeypatch.setitem(ENGINES.built_in, "scripted", scripted)  # type: ignore[arg-type]
    monkeypatch.setattr(ENGINES, "_found", {})
    monkeypatch.setattr(engine_latency, "CONCURRENCIES", (1,))
    return scripted


def finalists(context: JobContext) -> tuple[Finalist, ...]:
    held_out = [sample.image_key for sample in context.task.held_out]
    right = [1.0] * len(held_out)
    return tuple(map(Finalist, verify(right, {PLAN: right}, held_out, context.spec.constraint, seed=0)))


def published(context: JobContext, generate_speedup: float, device: str = "") -> publish.Published:
    chosen = finalists(context)
    served = engine_latency.run(context, [Chosen(each.candidate) for each in chosen])
    low, high = 0.98 * generate_speedup, 1.02 * generate_speedup
    where, seconds = device or context.worker.device, (1.0, 1 / generate_speedup)
    timed = LatencyComparison(PLAN, where, Workload(1, 2), *seconds, generate_speedup, low, high, 9, 8, 4)
    return publish.run(context, chosen, publish.Measured({chosen[0].candidate: timed}, served))


def test_a_job_is_judged_by_its_engine(store: Database, worker: in_process.OneWorker, engine: ScriptedEngine) -> None:
    limits = {"max_accuracy_drop": 1, "min_speedup": 1.3}
    context = in_process.context(store, worker, in_process.spec(**JOB, constraint=limits))
    engine_latency.find_engine(context)
    found = published(context, 1.01)  # too slow by generate, fast enough in the engine
    assert found.best == found.plan_ids[0]
    asked = [each for each in worker.requests if isinstance(each, CompareEngineLatency)]
    assert [(each.plan, each.engine, each.concurrencies) for each in asked] == [(PLAN, "scripted", (1, 2))]
    assert sum(isinstance(each, FindEngine) for each in worker.requests) == 1
    rows = plans.get(store, found.plan_ids[0]).engine_latencies
    assert [(row.engine, row.version, row.concurrency, row.dtype) for row in rows] == [
        ("scripted", "1", 1, "float32"),
        ("scripted", "1", 2, "float32"),
    ]
    for row in rows:
        assert 1.4 < row.speedup < 2.2
        assert row.dense_latency_seconds / row.latency_seconds == pytest.approx(row.speedup, rel=0.4)
    frame = engine_latencies(context.job.id, database=store.engine.url.render_as_string(hide_password=False))
    assert list(frame["concurrency"]) == [1, 2] and list(frame["speedup"]) == [row.speedup for row in rows]
    published(context, 1.01)  # resumed: read back, not measured again
    assert len([each for each in worker.requests if isinstance(each, CompareEngineLatency)]) == len(asked)

    query = PlanQuery(context.spec.model.path, context.task.name, max_accuracy_drop=1.0, min_speedup=1.3)
    with pytest.raises(NoFeasiblePlan):
        find_best(store, query)
    in_engine = PlanQuery(**{**vars(query), "engine": "scripted", "concurrency": 2})
    assert find_best(store, in_engine)[0].id == found.best
    with pytest.raises(
        NotFound, match="no plan was served by scripted with a concurrency of 3; measured: scripted at 1"
    ):
        find_best(store, PlanQuery(**{**vars(in_engine), "concurrency": 3}))


def test_a_plan_that_is_too_slow_in_the_engine_is_no_answer(
    store: Database, worker: in_process.OneWorker, engine: ScriptedEngine
) -> None:
    limits = {"max_accuracy_drop": 1, "min_speedup": 3}
    context = in_process.context(store, worker, in_process.spec(**JOB, constraint=limits))
    found = published(context, 5.0)
    assert found.best is None
    assert "1 surely keep the accuracy and 0 are surely fast enough in scripted; the fastest" in found.reason
    assert len(found.plan_ids) == 1


class Without(in_process.OneWorker):
    """A worker whose requests fail in the engine's part."""

    def __init__(self, other: in_process.OneWorker) -> None:
        vars(self).update(vars(other))

    def run(self, requests: Any) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            try:
                yield number, self.handler.handle(request)
            except Exception as error:
                yield number, _failure(request, error)


def _failure(request: Request, error: Exception) -> Any:
    return Failure(request, str(error), 1)


def test_an_engine_that_is_not_there_ends_the_job_before_it_measures(
    store: Database, worker: in_process.OneWorker, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(self: ScriptedEngine) -> Installed:
        raise EngineAbsent("scripted is not on the PATH; install it")

    monkeypatch.setattr(ScriptedEngine, "installed", absent)
    context = in_process.context(store, Without(worker), in_process.spec(**JOB))
    with pytest.raises(JobFailed, match=r"^latency\.engine: scripted is not on the PATH; install it$"):
        engine_latency.find_engine(context)


def test_actions_that_the_engine_does_not_serve_end_the_job_before_it_measures(
    store: Database, worker: in_process.OneWorker, engine: ScriptedEngine
) -> None:
    context = in_process.context(store, worker, in_process.spec(**JOB | {"actions": ["skip", "freeze"]}))
    with pytest.raises(
        JobFailed, match=r"^actions: scripted as it is installed does not serve freeze; leave them out$"
    ):
        engine_latency.find_engine(context)


def test_an_engine_that_fails_ends_the_job_and_is_asked_again(
    store: Database, worker: in_process.OneWorker, engine: ScriptedEngine
) -> None:
    engine.fault = "no start"
    context = in_process.context(store, Without(worker), in_process.spec(**JOB, constraint={"max_accuracy_drop": 1}))
    with pytest.raises(JobFailed, match=f"^plan {PLAN} cannot be timed in scripted: scripted does not start"):
        published(context, 5.0)
    engine.fault = ""
    assert published(context, 5.0).best is not None


def test_a_job_is_not_gone_on_with_in_another_version(
    store: Database, worker: in_process.OneWorker, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = in_process.context(store, worker, in_process.spec(**JOB))
    check_begun_alike(context, engine_latency.find_engine(context))
    monkeypatch.setattr(ScriptedEngine, "installed", lambda self: Installed("2", "program"))
    with pytest.raises(JobFailed, match="was begun before the engine changed"):
        check_begun_alike(context, engine_latency.find_engine(context))


def test_what_was_served_elsewhere_than_timed_is_not_published(
    store: Database, worker: in_process.OneWorker, engine: ScriptedEngine
) -> None:
    context = in_process.context(store, worker, in_process.spec(**JOB, constraint={"max_accuracy_drop": 1}))
    with pytest.raises(JobFailed, match="was timed on another and served on "):
        published(context, 5.0, device="another")
