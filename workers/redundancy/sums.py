"""Keep running sums that merge exactly: a shard's reply holds sums, never averages, and needs numpy alone.

A mean over tokens is a ratio of sums over samples (tokens of one sample are not independent), so every such statistic
keeps six numbers per entry, along the first axis of one array:

    sum of s, sum of n, sum of s^2, sum of s*n, sum of n^2, number of samples

where s is a sample's total and n how many tokens it counts for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.messages import KindSums, RedundancySums

Floats = NDArray[np.float64]


def ratio_sums(*shape: int) -> Floats:
    """Empty sums for a statistic of that shape: ``[6, *shape]``."""
    return np.zeros((6, *shape))


def sample_sums(totals: Floats, counts: Floats) -> Floats:
    """Return the six sums of samples' totals ``[..., samples]`` and counts (broadcast to them): ``[6, ...]``.

    A sample of count 0 has total 0 and is not one of the samples.
    """
    s, n = totals, np.broadcast_to(counts, totals.shape)
    return np.stack([each.sum(-1) for each in (s, n, s * s, s * n, n * n, (n > 0).astype(np.float64))])


def ratio_means(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, its standard error, and the count, each of the statistic's shape; NaN where nothing was counted.

    The error is that of the ratio estimator with samples as the independent units, sum of (s - mean * n)^2 over
    (sum of n)^2, times the finite-sample factor samples / (samples - 1) (Cochran 1977, section 6.4); NaN below two.
    """
    total, count, squares, products, count_squares, samples = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / count
        residual = np.maximum(squares - 2 * mean * products + mean * mean * count_squares, 0.0)
        error = np.sqrt(residual * samples / (samples - 1)) / count
    return mean, np.where(samples >= 2, error, np.nan), count


def merge(shards: Sequence[RedundancySums]) -> RedundancySums:
    """Add shards up. Raises ValueError when there are none, or they are of different models or kinds."""
    if not shards:
        raise ValueError("there is nothing to merge: give at least one shard")
    first = shards[0]
    if any(shard.num_layers != first.num_layers or shard.kinds.keys() != first.kinds.keys() for shard in shards):
        raise ValueError("shards of one model and of the same kinds of measurement are needed")
    passes = {name for shard in shards for name in shard.layer_executions}
    return RedundancySums(
        num_layers=first.num_layers,
        samples=sum(shard.samples for shard in shards),
        kinds={kind: _merge_kind([shard.kinds[kind] for shard in shards]) for kind in first.kinds},
        layer_executions={
            name: sum(shard.layer_executions.get(name, 0) for shard in shards) for name in sorted(passes)
        },
        failed_samples={name: reason for shard in shards for name, reason in shard.failed_samples.items()},
        notes=tuple(dict.fromkeys(note for shard in shards for note in shard.notes)),
    )


def _merge_kind(parts: Sequence[KindSums]) -> KindSums:
    added = {name: np.sum([part.added[name] for part in parts], axis=0) for name in parts[0].added}
    # A shard whose images could all not be opened has no rows, and no width to lay end to end.
    gathered = {
        name: np.concatenate([part.gathered[name] for part in parts if len(part.gathered[name])] or [np.zeros((0,))])
        for name in parts[0].gathered
    }
    refused = {layer: reason for part in parts for layer, reason in part.refused.items()}
    return KindSums(added, gathered, refused)
