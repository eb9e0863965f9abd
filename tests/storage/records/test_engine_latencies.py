"""What engines took: kept with the plan, and found by queries that name an engine."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select
from storage_builders import engine_latency, figures, scene

from storage.database import Database
from storage.errors import InvalidValue, NotFound
from storage.pareto import Group
from storage.queue import jobs
from storage.records import plans
from storage.records.engine_latencies import EngineLatency
from storage.records.plans import PlanQuery
from storage.schema import EngineLatencyRow

FAST, SLOW, UNSERVED = "RRSS", "RRRS", "RSSS"


def publish(db: Database, made: Any, *figures_: Any) -> list[plans.Plan]:
    group = Group(made.model_id, made.task_id, made.device_id, "w")
    return plans.publish(db, made.job, group, figures_)


def test_best_by_an_engine_is_its_own(db: Database) -> None:
    made = scene(db)
    by_generate = figures(
        FAST, speedup=2.0, engine_latencies=(engine_latency(1.2), engine_latency(1.1, concurrency=16))
    )
    in_engine = (engine_latency(1.6), engine_latency(1.0, concurrency=16), engine_latency(3.0, engine="llama.cpp"))
    by_vllm = figures(SLOW, speedup=1.3, engine_latencies=in_engine)
    published = publish(db, made, by_generate, by_vllm, figures(UNSERVED, speedup=3.0))
    assert published[1].engine_latencies == tuple(sorted(in_engine, key=lambda each: (each.engine, each.concurrency)))
    assert plans.get(db, published[2].id).engine_latencies == ()

    def best(**changes: Any) -> str | None:
        query = PlanQuery(model="m", task="t", model_ids=(made.model_id,), task_ids=(made.task_id,), **changes)
        found = plans.best(db, query)
        listed = plans.list_plans(db, replace(query, limit=1))
        assert [each.plan for each in listed] == ([] if found is None else [found.plan])
        return None if found is None else found.plan

    assert best() == UNSERVED
    assert best(engine="vllm") == SLOW
    assert best(engine="vllm", concurrency=16) == FAST
    assert best(engine="vllm", min_speedup=1.7) is None
    assert (
        best(engine="vllm", max_latency_seconds=0.0624) is None
        and best(engine="vllm", max_latency_seconds=0.063) == SLOW
    )
    assert best(engine="llama.cpp", min_speedup=2.9) == SLOW


def test_queries_against_python(db: Database) -> None:
    made, chosen = scene(db), random.Random(0)
    wanted: dict[str, tuple[float, float]] = {}
    rows = []
    for number in range(24):
        plan = format(number, "06b").replace("0", "R").replace("1", "S")
        own, other = chosen.choice([1.0, 1.25, 1.5, 2.0]), chosen.choice([1.0, 1.25, 1.5, 2.0])
        served = (engine_latency(other),) if number % 3 else ()
        if served:
            wanted[plan] = (other, own)
        rows.append(figures(plan, accuracy=0.9, speedup=own, engine_latencies=served))
    publish(db, made, *rows)
    found = plans.list_plans(db, PlanQuery(engine="vllm", min_speedup=1.25, limit=None))
    assert {each.plan for each in found} == {plan for plan, (speedup, _) in wanted.items() if speedup >= 1.25}
    speedups = [each.engine_latencies[0].speedup for each in found]
    assert speedups == sorted(speedups, reverse=True)


def test_published_again_it_takes_the_place_of_all_before(db: Database) -> None:
    made = scene(db)
    publish(db, made, figures(FAST, engine_latencies=(engine_latency(1.2), engine_latency(1.3, concurrency=4))))
    publish(db, made, figures(FAST, engine_latencies=(engine_latency(1.1, version="0.33.0"),)))
    (again,) = publish(db, made, figures(FAST, engine_latencies=(engine_latency(1.4),)))
    assert [(each.version, each.speedup) for each in again.engine_latencies] == [("0.32.0", 1.4)]
    assert publish(db, made, figures(FAST))[0].engine_latencies == ()


def test_what_was_not_measured_is_named(db: Database) -> None:
    made = scene(db)
    publish(db, made, figures(FAST, engine_latencies=(engine_latency(1.2), engine_latency(1.3, concurrency=4))))
    for query, message in (
        (PlanQuery(engine="vlm"), "no plan was served by vlm with a concurrency of 1; measured: vllm at 1, vllm at 4"),
        (PlanQuery(engine="vllm", concurrency=8), "no plan was served by vllm with a concurrency of 8"),
    ):
        with pytest.raises(NotFound, match=message):
            plans.list_plans(db, query)
    with pytest.raises(InvalidValue, match="concurrency is that of an engine"):
        plans.list_plans(db, PlanQuery(concurrency=4))


def test_figures_that_cannot_be_true_are_refused(db: Database) -> None:
    made = scene(db)
    for change, message in (
        ({"speedup_low": 2.0}, "plan RRSS in vllm: speedup_low is above speedup_high"),
        ({"latency_seconds": 0.0}, "plan RRSS in vllm: latency_seconds is 0.0, must be above 0"),
        ({"concurrency": 0}, "plan RRSS in vllm: concurrency is 0, must be at least 1"),
    ):
        with pytest.raises(InvalidValue, match=message):
            publish(db, made, figures(FAST, engine_latencies=(engine_latency(1.2, **change),)))
    assert plans.for_job(db, made.job.id) == []


def test_they_go_with_their_job(db: Database) -> None:
    made = scene(db)
    publish(db, made, figures(FAST, engine_latencies=(engine_latency(1.2),)))

    def count() -> int | None:
        with db.transaction() as session:
            return session.scalar(select(func.count()).select_from(EngineLatencyRow))

    assert count() == 1
    with db.transaction() as session:
        session.execute(jobs.JobRow.__table__.delete())
    assert count() == 0
    assert EngineLatency.__dataclass_fields__.keys() <= set(EngineLatencyRow.__table__.columns.keys())
