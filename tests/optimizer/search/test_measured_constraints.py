"""The constraints that are judged on a finalist's measured request."""

import pytest

from optimizer.job.sections import ConstraintSpec
from optimizer.stages.publish import Speed, fast_enough
from workers.messages import EngineLevel, EngineTimes, LatencyComparison, Workload

MEASURED = LatencyComparison(
    plan="RSRS",
    device="none",
    workload=Workload(),
    dense_latency_seconds=0.060,
    latency_seconds=0.040,
    speedup=1.5,
    speedup_low=1.4,
    speedup_high=1.6,
    pairs=10,
    dense_kv_cache_bytes=4000,
    kv_cache_bytes=2000,
)


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({}, True),
        ({"max_latency_ms": 40.5}, True),
        ({"max_latency_ms": 39.5}, False),
        ({"max_kv_cache_bytes": 2000}, True),
        ({"max_kv_cache_bytes": 1999}, False),
        ({"min_speedup": 1.4}, True),
        ({"min_speedup": 1.45}, False),
        ({"min_speedup": 1.4, "max_latency_ms": 39.5}, False),
    ],
)
def test_every_measured_limit_counts(limits, met):
    assert fast_enough(Speed(MEASURED), ConstraintSpec(**limits)) is met


IN_ENGINE = EngineLevel(
    concurrency=4,
    speedup=1.2,
    speedup_low=1.1,
    speedup_high=1.3,
    rounds=10,
    dense=EngineTimes(0.02, 0.01, 0.12, 8.0),
    plan=EngineTimes(0.02, 0.01, 0.10, 10.0),
)


@pytest.mark.parametrize(
    ("limits", "served", "met"),
    [
        ({}, True, True),
        ({}, False, False),  # what the engine did not serve is not fast there
        ({"min_speedup": 1.1}, True, True),
        ({"min_speedup": 1.4}, True, False),  # enough for generate, not for the engine
        ({"max_latency_ms": 101}, True, True),
        ({"max_latency_ms": 99}, True, False),
        ({"max_kv_cache_bytes": 1999}, True, False),
    ],
)
def test_an_engine_judges_where_the_job_names_one(limits, served, met):
    speed = Speed(MEASURED, "vllm", IN_ENGINE if served else None)
    assert fast_enough(speed, ConstraintSpec(**limits)) is met
