"""The constraints that are judged on a finalist's measured request."""

import pytest

from optimizer.job.sections import ConstraintSpec
from optimizer.stages.publish import Speed, fast_enough
from workers.messages import EngineComparison, EngineLevel, EngineTimes, LatencyComparison, Workload

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
    assert fast_enough(Speed.of(MEASURED, None, 1), ConstraintSpec(**limits)) is met


IN_ENGINE = EngineComparison(
    plan="RSRS",
    engine="vllm",
    version="1",
    device="none",
    dtype="float32",
    workload=Workload(),
    levels=(
        EngineLevel(1, 3.0, 2.9, 3.1, 10, EngineTimes(0.02, 0.01, 0.12, 8.0), EngineTimes(0.01, 0.01, 0.04, 25.0)),
        EngineLevel(4, 1.2, 1.1, 1.3, 10, EngineTimes(0.02, 0.01, 0.12, 8.0), EngineTimes(0.02, 0.01, 0.10, 10.0)),
    ),
    kv_cache_bytes=None,
    dense_kv_cache_tokens=None,
    kv_cache_tokens=None,
)


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({}, True),
        ({"min_speedup": 1.1}, True),
        ({"min_speedup": 1.4}, False),  # enough for generate and for one request, not for four at once
        ({"max_latency_ms": 101}, True),
        ({"max_latency_ms": 99}, False),
        ({"max_kv_cache_bytes": 1999}, False),
    ],
)
def test_an_engine_judges_where_the_job_names_one(limits, met):
    assert fast_enough(Speed.of(MEASURED, IN_ENGINE, 4), ConstraintSpec(**limits)) is met
