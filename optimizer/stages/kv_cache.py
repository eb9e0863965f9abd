"""KV-cache bytes of plans before they are evaluated, from one short measurement of the dense and a bypassing model."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.stages.context import JobContext, JobFailed
from workers.messages import CompareLatency, Failure, LatencyComparison
from workers.runtime import Action, SkipPlan

SECONDS = 1.0
"""The comparison is asked for its cache sizes; its times are not used."""


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that one layer's cache holds at the end of a request: of all tokens, and of text alone."""

    run: float
    bypass: float

    def of(self, plan: SkipPlan) -> float:
        """Bytes of a plan's cache; a frozen layer keeps keys and values of all tokens, a skipped one keeps none."""
        bypassed = sum(action.row.hides_vision for action in plan)
        return bypassed * self.bypass + (len(plan.kept) - bypassed) * self.run


def measured(context: JobContext) -> CacheSizes:
    """Measure on one worker, or read back. Raises JobFailed when the model cannot be run."""
    return context.once("cache sizes", CacheSizes, lambda: _measure(context))


def _measure(context: JobContext) -> CacheSizes:
    info = context.worker
    hiding = [action for action in Action if action.row.hides_vision]
    plan = SkipPlan(
        tuple(
            next((action for action in hiding if action.letter in allowed), Action.RUN)
            for allowed in info.allowed_actions
        )
    )
    request = CompareLatency(plan.text, workload=context.workload, max_seconds=SECONDS)
    ((_, result),) = context.pool.run([request])
    if isinstance(result, Failure):
        raise JobFailed(f"the size of the KV cache could not be measured: {result.reason}")
    assert isinstance(result, LatencyComparison)
    run = result.dense_kv_cache_bytes / info.num_layers
    bypassed = sum(action.row.hides_vision for action in plan)
    saved = result.dense_kv_cache_bytes - result.kv_cache_bytes
    return CacheSizes(run, run - saved / bypassed if bypassed else run)
