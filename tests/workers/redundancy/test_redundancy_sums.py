"""Shards add up exactly, in any order, and pickle small."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measurement_tables import columns

from workers.models.loading import LoadedModel
from workers.redundancy.kinds import KINDS, ON_FEW, finish
from workers.redundancy.measure import measure_redundancy
from workers.redundancy.sums import KindSums, RedundancySums, merge, ratio_means, ratio_sums, sample_sums
from workers.tasks import Task


@given(st.lists(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 5)), max_size=8), min_size=1, max_size=4))
def test_ratio_sums_equal_the_estimator_on_all_samples(shards: list[list[tuple[float, int]]]) -> None:
    total = ratio_sums(1)
    for shard in shards:
        counts = np.array([float(n) for _, n in shard])
        total += sample_sums(np.array([[value * n for value, n in shard]]), counts)
    mean, error, count = (float(each[0]) for each in ratio_means(total))
    kept = [(value * n, n) for shard in shards for value, n in shard if n]
    assert count == sum(n for _, n in kept)
    if not kept:
        assert np.isnan(mean) and np.isnan(error)
        return
    expected = sum(s for s, _ in kept) / count
    assert mean == pytest.approx(expected, abs=1e-9)
    if len(kept) < 2:
        assert np.isnan(error)
        return
    residual = sum((s - expected * n) ** 2 for s, n in kept)
    assert error == pytest.approx(np.sqrt(residual * len(kept) / (len(kept) - 1)) / count, abs=1e-6)


def test_shards_merge_to_the_whole(tiny: LoadedModel, few: Task) -> None:
    kinds = tuple(kind for kind in KINDS if kind not in ON_FEW)  # these are of some shards alone
    whole = measure_redundancy(tiny, few, kinds, batch_size=1)
    parts = [measure_redundancy(tiny, few, kinds, shard=shard, shards=3, batch_size=1) for shard in range(3)]
    assert all(0 < part.samples < whole.samples for part in parts)
    merged = merge(parts)
    assert merged.samples == whole.samples
    found, expected = finish(merged), finish(whole)
    assert columns(found) == columns(expected)
    for row in expected.rows:
        again = found.row(row.name, row.token_group, row.layer)
        assert again is not None and again.n == row.n
        assert again.value == pytest.approx(row.value, rel=1e-6, abs=1e-9), row
        if row.standard_error is not None:
            assert again.standard_error == pytest.approx(row.standard_error, rel=1e-5, abs=1e-9), row
    assert columns(finish(merge(parts[::-1]))) == columns(expected)


def test_a_reply_does_not_grow_with_the_samples(tiny: LoadedModel, few: Task) -> None:
    kinds = tuple(kind for kind in KINDS if kind != "probes")  # probes keep one state per sample and depth
    sizes = {len(pickle.dumps(measure_redundancy(tiny, few, kinds, shards=shards))) for shards in (1, 4)}
    assert max(sizes) - min(sizes) < 200
    assert max(sizes) < 200_000


def test_merging_refuses_what_does_not_belong_together() -> None:
    one = RedundancySums(2, 1, {"a": KindSums()}, {})
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    for other in (RedundancySums(3, 1, {"a": KindSums()}, {}), RedundancySums(2, 1, {"b": KindSums()}, {})):
        with pytest.raises(ValueError, match="one model"):
            merge([one, other])
