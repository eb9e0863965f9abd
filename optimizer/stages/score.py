"""Station 2: redundancy statistics of every layer on the calibration split, sharded over the workers."""

from __future__ import annotations

from optimizer.criterion import Redundancy, merge
from optimizer.inputs import split_hash
from optimizer.stages.context import JobContext, JobFailed
from storage import measurements
from workers.messages import RedundancySums, ScoreRedundancy


def run(context: JobContext) -> Redundancy:
    """Measure the redundancy of all layers, or read it back."""
    shards = min(context.pool.size, len(context.task.calibration))
    context.progress.begin("score redundancy", shards)
    return context.once("score", Redundancy, lambda: _measure(context, shards))


def _measure(context: JobContext, shards: int) -> Redundancy:
    sums: dict[int, RedundancySums] = {}
    for index, reply in context.ask([ScoreRedundancy(shard, shards) for shard in range(shards)]):
        assert isinstance(reply, RedundancySums)
        sums[index] = reply
        context.progress.advance()
    try:
        redundancy = merge([sums[index] for index in sorted(sums)])
    except ValueError as error:
        raise JobFailed(f"task {context.task.name}: {error}") from None
    measurements.record_redundancy(
        context.db,
        context.job,
        model_id=context.model_id,
        task_id=context.task_id,
        calibration_hash=split_hash(context.task, "calibration"),
        measurements=[
            measurements.Redundancy(
                layer=layer,
                token_group=group,
                name="cosine_distance",
                value=value,
                standard_error=redundancy.standard_error[group][layer],
                n=redundancy.tokens[group],
            )
            for group, values in redundancy.distance.items()
            for layer, value in enumerate(values)
        ],
    )
    return redundancy
