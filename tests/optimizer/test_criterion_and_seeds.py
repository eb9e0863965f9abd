"""Criterion, space and seeds on numbers small enough to check by hand, and shard merging against one pass."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.criterion import GeometricCriterion, merge
from optimizer.errors import UsageFault
from optimizer.job import JobSpec
from optimizer.seeds import nested_sets
from optimizer.space import PlanSpace, plan_space, touched
from workers.messages import RedundancySums, WorkerInfo
from workers.runtime import SkipPlan


def sums(values: dict[str, np.ndarray]) -> RedundancySums:
    """One shard of one sample per row."""
    return RedundancySums(
        distance_sum={group: tuple(map(float, v.sum(0))) for group, v in values.items()},
        distance_squares={group: tuple(map(float, (v**2).sum(0))) for group, v in values.items()},
        sample_squares={group: tuple(map(float, (v**2).sum(0))) for group, v in values.items()},
        sample_products={group: tuple(map(float, v.sum(0))) for group, v in values.items()},
        tokens={group: len(v) for group, v in values.items()},
        token_squares={group: len(v) for group, v in values.items()},
        samples=len(values["text"]),
    )


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_merged_shards_equal_one_pass(shards, seed):
    rng = np.random.default_rng(seed)
    parts = [dict.fromkeys(("vision", "text", "all"), rng.random((int(rng.integers(2, 20)), 3))) for _ in range(shards)]
    merged = merge([sums(part) for part in parts])
    together = np.concatenate([part["text"] for part in parts])
    for group in ("vision", "text", "all"):
        assert merged.distance[group] == pytest.approx(together.mean(0))
        assert merged.standard_error[group] == pytest.approx(together.std(0, ddof=1) / np.sqrt(len(together)))
    assert merged.samples == len(together)


def test_merge_refuses_a_group_without_tokens():
    empty = {"vision": np.zeros((0, 2)), "text": np.ones((1, 2)), "all": np.ones((1, 2))}
    with pytest.raises(ValueError, match="no vision tokens"):
        merge([sums(empty)])


def redundancy(vision, text):
    part = {"vision": np.array([vision]), "text": np.array([text]), "all": np.array([vision])}
    return merge([sums(part)])


def test_geometric_risk_needs_both_groups_for_skip_and_vision_alone_for_freeze():
    risk = GeometricCriterion()(redundancy([0.1, 0.5, 0.2], [0.4, 0.1, 0.3]))
    assert risk.risk["F"] == pytest.approx((0.1, 0.5, 0.2))
    assert risk.risk["S"] == pytest.approx((0.4, 0.5, 0.3))
    assert risk.order("F") == (0, 2, 1)
    assert risk.order("S") == (2, 0, 1)


def test_nested_sets_grow_in_risk_order_and_never_empty_the_model():
    risk = GeometricCriterion()(redundancy([0.1, 0.5, 0.2], [0.1, 0.5, 0.2]))
    skips = PlanSpace(("RS", "RS", "RS"), 3)
    assert [plan.text for plan in nested_sets(skips, risk, 99)] == ["SRR", "SRS"]
    both = PlanSpace(("RFS", "RFS", "RF"), 2)
    assert [plan.text for plan in nested_sets(both, risk, 99)] == ["FRR", "SRR", "FRF", "SSR"]
    assert [plan.text for plan in nested_sets(both, risk, 2)] == ["FRR", "SRR"]
    assert all(plan in both for plan in nested_sets(both, risk, 99))


def worker(allowed):
    return WorkerInfo(0, "n", "cpu", 1, "llava", "f", len(allowed), tuple(allowed), 1, "float32")


def spec(**fields):
    return JobSpec.model_validate({"model": {"path": "m"}, "task": "t", **fields})


def test_space_is_what_model_and_job_both_allow():
    space = plan_space(spec(actions=["skip", "freeze"], protect=[1]), worker(["RFBS", "RFBS", "RS", "R"]))
    assert space.letters == ("RFS", "R", "RS", "R")
    assert space.free_layers == (0, 2) and space.size == 6
    assert SkipPlan.parse("FRSR") in space and SkipPlan.parse("RSRR") not in space and SkipPlan.parse("RR") not in space


def test_space_counts_touched_layers():
    space = plan_space(spec(constraint={"max_layers_touched": 1}), worker(["RS"] * 4))
    assert len(list(space.enumerate())) == 5
    assert all(touched(plan) <= 1 for plan in space.enumerate())


def test_space_names_what_is_wrong():
    with pytest.raises(UsageFault, match=r"protect: layer 9 .* 0\.\.1"):
        plan_space(spec(protect=[9]), worker(["RS", "RS"]))
    with pytest.raises(UsageFault, match="actions: no layer"):
        plan_space(spec(actions=["bypass"]), worker(["RS", "RS"]))
