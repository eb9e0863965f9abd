"""List the kinds of measurement: names in the table, the pass each needs, and how its sums become rows.

Needs numpy alone, so that the driver can finish what workers summed up. A new kind is an entry of ``KINDS`` here and
a collector of the same name in ``workers.redundancy.collectors``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.errors import MeasurementError
from workers.messages import TOKEN_GROUPS, KindSums, RedundancySums
from workers.runtime.plan import Action

from .probes import probe_rows
from .sums import Floats, ratio_means
from .table import LayerMeasurement, LayerTable

GROUPS = (*TOKEN_GROUPS, "last")
"""Token groups, and the last prompt token, from which the answer's first token is read."""

ANSWER = "answer"
"""Token group of the positions that the dense model's answer is read from: the last prompt token, and the answer's own
tokens but the one that ends it."""

TAIL_THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
QUANTILES = (0.5, 0.9, 0.99)
HISTOGRAM_EDGES: Floats = np.concatenate([[0.0], np.geomspace(1e-6, 2.0, 255)])
"""Bins of the cosine distance, for its quantiles: 255 of them, each 6 % wide."""

INTERVENTIONS = tuple(action for action in Action if action is not Action.RUN and not action.row.leaves_out)
"""Actions on whole layers."""

OPERATORS = tuple(action for action in Action if action.row.leaves_out)
"""Actions that leave out a part of the layer; kinds of their own run them, for jobs that search them."""

PER_OPERATOR = {
    "distance": "operators",
    "angular": "operators",
    "trials": "operator_trials",
    "causal": "operator_causal",
}
"""By kind of measurement the one that says the same of attention and of the MLP."""

PARTS = ("attention", "mlp")

TRIED = {
    "trials": INTERVENTIONS,
    "operator_trials": OPERATORS,
    "causal": INTERVENTIONS,
    "operator_causal": OPERATORS,
}
"""Actions that kinds try at every layer, in the order of their sums."""

ON_FEW = ("trials", "operator_trials")
"""Kinds that try them on every ``TRIED_SHARDS``-th shard of the samples alone."""
TRIED_SHARDS = 2

AFTER_ALL = (*TRIED, "withdrawal")
"""Kinds that run actions themselves, a pass for each: not measured unless asked for."""

Finish = Callable[[KindSums, int], Iterable[LayerMeasurement]]


@dataclass(frozen=True)
class Kind:
    """A kind of measurement: its meaning, the pass it is made in, and how merged sums become rows."""

    about: str
    runs_in: str
    """``states`` (the dense pass), ``attention`` (one pass that makes attention weights), or an intervention's pass."""
    finish: Finish


def rows_of(sums: Floats, names: tuple[str, ...], group: str, layers: int) -> Iterator[LayerMeasurement]:
    """Rows from ratio sums ``[6, names, layers]`` of one group; an entry that counted nothing gives none."""
    means, errors, counts = ratio_means(sums)
    for position, name in enumerate(names):
        for layer in range(layers):
            if counts[position, layer] > 0:
                error = float(errors[position, layer])
                yield LayerMeasurement(
                    name,
                    group,
                    layer,
                    float(means[position, layer]),
                    None if np.isnan(error) else error,
                    round(float(counts[position, layer])),
                )


def _distance_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``distances`` is ``[6, 2 + thresholds, groups, layers]``, ``histogram`` ``[groups, layers, bins]``."""
    names = ("cosine_distance", "relative_update", *(f"cosine_distance_tail@{t:g}" for t in TAIL_THRESHOLDS))
    for position, group in enumerate(GROUPS):
        yield from rows_of(sums.added["distances"][:, :, position].astype(float), names, group, layers)
        for layer in range(layers):
            counts = sums.added["histogram"][position, layer]
            for share in QUANTILES if counts.sum() else ():
                value = histogram_quantile(counts, share)
                yield LayerMeasurement(
                    f"cosine_distance_quantile@{share:g}", group, layer, value, None, int(counts.sum())
                )


def histogram_quantile(counts: NDArray[np.generic], share: float) -> float:
    """Return the quantile of a distance from its histogram over ``HISTOGRAM_EDGES``, linear within the bin."""
    below = np.concatenate([[0.0], np.cumsum(counts.astype(float))])
    target = share * below[-1]
    index = min(int(np.searchsorted(below, target, side="left")), len(HISTOGRAM_EDGES) - 1)
    index = max(index, 1)
    inside = below[index] - below[index - 1]
    part = (target - below[index - 1]) / inside if inside else 0.0
    low, high = HISTOGRAM_EDGES[index - 1], HISTOGRAM_EDGES[index]
    return float(low + part * (high - low))


def _similarity_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``hsic`` is ``[groups, layers, 3]`` (cross, before, after), ``products`` the sums of their outer products."""
    for position, group in enumerate(TOKEN_GROUPS):
        for layer in range(layers):
            batches = int(sums.added["batches"][position])
            cross, before, after = sums.added["hsic"][position, layer].astype(float)
            if batches == 0 or before <= 0 or after <= 0:
                continue
            value = cross / np.sqrt(before * after)
            gradient = np.array([value / cross if cross else 0.0, -value / (2 * before), -value / (2 * after)])
            error = None
            if batches > 1:
                total = np.array([cross, before, after])
                spread = sums.added["products"][position, layer] - np.outer(total, total) / batches
                variance = float(gradient @ spread @ gradient) * batches / (batches - 1)
                error = float(np.sqrt(max(0.0, variance)))
            yield LayerMeasurement("cka", group, layer, float(value), error, int(sums.added["tokens"][position]))


def _operator_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``operators`` is ``[6, 3, parts, groups, layers]``: distance, angle, and share of the layer's change."""
    for number, part in enumerate(PARTS):
        names = tuple(f"operator_{name}@{part}" for name in ("distance", "angle", "share"))
        for position, group in enumerate(GROUPS):
            yield from rows_of(sums.added["operators"][:, :, number, position].astype(float), names, group, layers)


def _attention_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``attention`` is ``[6, 2, layers]``: from all text queries, and from the last prompt token."""
    shares = sums.added["attention"].astype(float)
    yield from rows_of(shares[:, :1], ("vision_attention",), "text", layers)
    yield from rows_of(shares[:, 1:], ("vision_attention",), "last", layers)


def _propagation_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``gain`` is ``[6, 3, groups, layers]``: the gain, and how far the last layer's state moves and turns.

    ``kl`` is ``[6, 2, layers]``: the divergence of the answer's first token, and of all its tokens.
    """
    for position, group in enumerate((*GROUPS, ANSWER)):
        names = ("propagation_gain", "final_change", "final_distance")
        yield from rows_of(sums.added["gain"][:, :, position].astype(float), names, group, layers)
    yield from _divergence_rows(sums.added["kl"][:, :, None].astype(float), ("final_divergence",), layers)


def _angular_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``angles`` is ``[6, blocks, layers]``: the block of n layers from a layer on, at the last prompt token."""
    names = tuple(f"angular_distance@{length}" for length in range(1, layers + 1))
    yield from rows_of(sums.added["angles"].astype(float), names, "last", layers)


def divergence_rows(name: str, actions: tuple[Action, ...]) -> Finish:
    """Make the rows of what actions do alone; ``kl`` is ``[6, 2, actions, layers]``."""
    names = tuple(f"{name}@{action.label}" for action in actions)
    return lambda sums, layers: _divergence_rows(sums.added["kl"].astype(float), names, layers)


def _withdrawal_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """``kl`` is ``[6, 2, 1, layers]``: vision tokens withdrawn from this layer on."""
    yield from _divergence_rows(sums.added["kl"].astype(float), ("withdrawal",), layers)


def _divergence_rows(sums: Floats, names: tuple[str, ...], layers: int) -> Iterator[LayerMeasurement]:
    """Rows from ``[6, 2, names, layers]``: of the answer's first token, and the mean over all its tokens."""
    for position, group in enumerate(("last", ANSWER)):
        yield from rows_of(sums[:, position], names, group, layers)


KINDS: dict[str, Kind] = {
    "distance": Kind("cosine distance of every layer, its tail and quantiles", "states", _distance_rows),
    "cka": Kind("linear CKA of every layer's input and output", "states", _similarity_rows),
    "angular": Kind("angular distance of every block of layers", "states", _angular_rows),
    "probes": Kind("linear probes of the dense model's answer", "states", probe_rows),
    "operators": Kind("what attention and the MLP of every layer add", "states", _operator_rows),
    "attention": Kind("attention mass of text on vision tokens", "attention", _attention_rows),
    "propagation": Kind("how a layer's removal grows on the way up", "propagation", _propagation_rows),
    "trials": Kind(
        "KL divergence of the answer under every action at every layer, on half of the samples",
        "trials",
        divergence_rows("trial_divergence", INTERVENTIONS),
    ),
    "operator_trials": Kind(
        "the same without attention, and without the MLP",
        "operator_trials",
        divergence_rows("trial_divergence", OPERATORS),
    ),
    "causal": Kind(
        "KL divergence of the answer under every action at every layer",
        "causal",
        divergence_rows("layer_contribution", INTERVENTIONS),
    ),
    "operator_causal": Kind(
        "the same without attention, and without the MLP",
        "operator_causal",
        divergence_rows("layer_contribution", OPERATORS),
    ),
    "withdrawal": Kind("KL divergence with vision tokens gone from a layer on", "withdrawal", _withdrawal_rows),
}


def finish(merged: RedundancySums) -> LayerTable:
    """Turn merged sums into the table. Raises MeasurementError when no sample was measured."""
    if merged.samples == 0:
        raise MeasurementError("no sample of the calibration split could be measured: none of its images can be opened")
    rows = [row for kind, sums in merged.kinds.items() for row in KINDS[kind].finish(sums, merged.num_layers)]
    return LayerTable(merged.num_layers, tuple(rows))
