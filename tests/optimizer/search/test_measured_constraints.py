"""The constraints that are judged on a finalist's measured request."""

import pytest

from optimizer.job.sections import ConstraintSpec
from optimizer.stages.publish import fast_enough
from workers.messages import LatencyComparison, Workload

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
    assert fast_enough(MEASURED, ConstraintSpec(**limits)) is met
