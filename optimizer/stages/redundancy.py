"""Stage 3: measure the layers' redundancy on the calibration split, as far as the job's criterion needs it.

Measurements that any job has stored of this model, on these samples, under these settings are read, not repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from optimizer import criteria
from optimizer.job.inputs import split_hash
from optimizer.search.strategies.published import KINDS as STRATEGY_KINDS
from optimizer.stages.context import JobContext, JobFailed
from storage.queue import stages
from storage.records import measurements
from workers.errors import MeasurementError
from workers.messages import LinearRedundancy, MeasureLinearRedundancy, MeasureRedundancy, RedundancySums
from workers.redundancy.kinds import KINDS, ON_FEW, TRIED_SHARDS, finish
from workers.redundancy.sums import merge
from workers.redundancy.table import LayerMeasurement, LayerTable

SHARD_SAMPLES = 8
"""Samples a worker takes at a time; fixed, so that the sums are the same on any number of workers."""

VERSION = 3
"""Of what the measurements mean; those of another version are measured anew. 3: every action is tried at all layers,
on half of the samples."""

LINEAR = "linear"
"""The kind that is measured for compensated plans: what linear maps leave unexplained, for all pairs of layers."""

DONE = "measured"
"""Name of the row that says a kind was measured; its group is the kind, its n the number of samples."""


def run(context: JobContext) -> LayerTable:
    """Measure what the job's criterion and strategy need, or read it back."""
    criterion = criteria.load(context.spec.criterion, context.spec.thresholds)
    kinds = [*criteria.kinds_for(criterion, context.spec.letters)]
    kinds += STRATEGY_KINDS.get(context.spec.search.strategy, ())
    if context.spec.compensation.kind != "none":
        kinds.append(LINEAR)
    return measured(context, tuple(dict.fromkeys(kinds)))


def measured(context: JobContext, kinds: Sequence[str]) -> LayerTable:
    """Return a table of at least these kinds of measurement; missing ones are measured and stored.

    Raises JobFailed when a kind cannot be measured.
    """
    table, done = _stored(context)
    missing = tuple(kind for kind in kinds if kind not in done)
    states = tuple(kind for kind in missing if kind != LINEAR)
    count = -(-measured_samples(context) // SHARD_SAMPLES)
    shards = range(0, count, TRIED_SHARDS if set(states) <= set(ON_FEW) else 1)
    context.progress.begin("measure redundancy", len(shards) if missing else 0)
    if states:
        table = table.joined(_measure(context, states, shards, count))
    if LINEAR in missing:
        table = table.joined(_measure_linear(context))
    return table


def _measure(context: JobContext, missing: tuple[str, ...], shards: range, count: int) -> Sequence[LayerMeasurement]:
    """Measure kinds on some of the ``count`` shards, one by one, and store them."""
    replies: dict[int, RedundancySums] = {}
    n_samples = context.spec.redundancy_samples
    for index, reply in context.ask([MeasureRedundancy(missing, shard, count, n_samples) for shard in shards]):
        assert isinstance(reply, RedundancySums)
        context.failed_samples.add("calibration", reply.failed_samples)
        replies[index] = reply
        context.progress.advance()
    scores = merge([replies[index] for index in sorted(replies)])
    try:
        found = finish(scores)
    except MeasurementError as error:
        raise JobFailed(f"task {context.task.name}: {error}") from None
    for note in scores.notes:
        context.progress.note(note)
    passes = {f"redundancy_passes_{name}": count for name, count in scores.forward_passes.items() if count}
    stages.add_counters(context.db, context.job, passes)
    markers = [LayerMeasurement(DONE, kind, 0, 1.0, None, scores.samples) for kind in missing]
    _store(context, [*found.rows, *markers])
    return found.rows


def _measure_linear(context: JobContext) -> Sequence[LayerMeasurement]:
    """Measure the linear redundancy on one worker, and store it; without rows where no layer can hold a map."""
    ((_, reply),) = context.ask([MeasureLinearRedundancy()])
    assert isinstance(reply, LinearRedundancy)
    context.failed_samples.add("calibration", reply.failed_samples)
    for layer, reason in reply.refusals.items():
        context.progress.note(f"no gap behind layer {layer} can be compensated: {reason}")
    rows = [
        LayerMeasurement(
            f"linear_redundancy@{share.end - share.layer}", "all", share.layer, share.unexplained, None, reply.tokens
        )
        for share in reply.shares
    ]
    _store(context, [*rows, LayerMeasurement(DONE, LINEAR, 0, 1.0, None, reply.tokens)])
    return rows


def measured_samples(context: JobContext) -> int:
    """Count the calibration samples that redundancy is measured on."""
    return min(context.spec.redundancy_samples or len(context.task.calibration), len(context.task.calibration))


def measurement_key(context: JobContext) -> str:
    """Hash the calibration samples and what else a measurement depends on: settings, failed samples, version."""
    text = f"version {VERSION} {split_hash(context.task, 'calibration')} {context.settings}"
    if measured_samples(context) < len(context.task.calibration):
        text += f" first {measured_samples(context)}"
    if failed := context.failed_samples.of("calibration"):
        text += f" without {' '.join(sorted(failed))}"
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(context: JobContext) -> tuple[LayerTable, frozenset[str]]:
    """Read the stored measurements of this model on these samples, and which kinds are complete."""
    rows = measurements.redundancy(
        context.db,
        model_id=context.model_id,
        task_id=context.task_id,
        calibration_hash=measurement_key(context),
    )
    done = frozenset(row.token_group for row in rows if row.name == DONE)
    known = tuple(
        LayerMeasurement(row.name, row.token_group, row.layer, row.value, row.standard_error, row.n)
        for row in rows
        if row.name != DONE
    )
    return LayerTable(context.worker.num_layers, known), done & (KINDS.keys() | {LINEAR})


def _store(context: JobContext, rows: Sequence[LayerMeasurement]) -> None:
    measurements.record_redundancy(
        context.db,
        context.job,
        model_id=context.model_id,
        task_id=context.task_id,
        calibration_hash=measurement_key(context),
        measurements=[
            measurements.Redundancy(row.layer, row.token_group, row.name, row.value, row.standard_error, row.n)
            for row in rows
        ],
    )
