"""Run the stages of a job in order. Each stores its result, and a resumed job reads the finished ones back."""

from __future__ import annotations

from optimizer.stages import collateral, dense, measure, profile, publish, redundancy, search, verify
from optimizer.stages.context import JobContext
from optimizer.stages.publish import Published


def run(context: JobContext) -> Published:
    """Take a claimed job from the model to published plans. Raises JobFailed when a stage cannot be passed."""
    latency = profile.run(context)
    nothing = search.out_of_reach(context, latency)
    if nothing is not None:
        return publish.none(context, nothing)
    dense.run(context)
    table = redundancy.run(context)
    outcome = search.run(context, latency, table)
    finalists = verify.run(context, latency, outcome)
    measured = measure.run(context, finalists)
    beside = collateral.run(context, finalists)
    return publish.run(context, finalists, measured, beside)
