"""Stage 1: measure the seconds, and where needed the KV-cache bytes, of every layer under every action."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.search.latency import LayerCounts, LayerTimes
from optimizer.stages.context import JobContext, JobFailed
from storage.records import measurements
from storage.records.measurements import ProfileRecord
from workers.messages import CompareLatency, Failure, LatencyComparison, LatencyProfile, ProfileLatency
from workers.runtime import Action, SkipPlan

CACHE_SECONDS = 1.0
"""Time for the comparison that gives cache sizes; its latencies are not used."""


def run(context: JobContext) -> LayerTimes:
    """Measure the profile on one worker while the others wait, or read it back; nothing where layers are counted."""
    if context.spec.search.latency_model == "layers":
        return LayerCounts.of(context.worker.num_layers, context.spec.letters)
    context.progress.begin("profile latency", 1)
    profile = context.load_or_compute("profile", LatencyProfile, lambda: _measure(context))
    context.progress.advance(news=f"dense {profile.dense_latency_seconds * 1000:.1f} ms a request")
    return profile


def _measure(context: JobContext) -> LatencyProfile:
    spec = context.spec
    ((_, profile),) = context.ask(
        [ProfileLatency(actions=spec.letters, workload=context.workload, verify=spec.is_lossless)]
    )
    assert isinstance(profile, LatencyProfile)
    context.failed_samples.add("calibration", profile.failed_samples)
    measurements.record_profile(
        context.db,
        context.job,
        ProfileRecord(
            model_id=context.model_id,
            task_id=context.task_id,
            device=profile.device,
            workload=context.workload_name,
            prompt_tokens=profile.prompt_tokens,
            dense_latency_seconds=profile.dense_latency_seconds,
            layer_seconds=profile.layer_seconds,
            phases={
                "prefill": {"dense": profile.dense_prefill_seconds, **profile.prefill_seconds},
                "decode": {"dense": profile.dense_decode_seconds, **profile.decode_seconds},
                **({"verify": profile.verify_seconds} if profile.verify_seconds else {}),
            },
            relative_error=profile.relative_error,
        ),
    )
    return profile


@dataclass(frozen=True)
class CacheSizes:
    """KV-cache bytes of one layer at the end of a request: of all tokens, and of text alone."""

    run: float
    bypass: float

    def of(self, plan: SkipPlan) -> float:
        """Predict the bytes of a plan's cache: a frozen layer keeps all keys and values, one without attention none."""
        bypassed = sum(action.row.hides_vision for action in plan)
        keeping = sum(action.row.keeps_keys for action in plan)
        return bypassed * self.bypass + (keeping - bypassed) * self.run


def cache_sizes(context: JobContext) -> CacheSizes:
    """Measure the sizes by a dense and a bypassing request, or read them back. Raises JobFailed where that fails."""
    return context.load_or_compute("cache sizes", CacheSizes, lambda: _measure_cache(context))


def _measure_cache(context: JobContext) -> CacheSizes:
    info = context.worker
    hiding = [action for action in Action if action.row.hides_vision]
    plan = SkipPlan(
        tuple(
            next((action for action in hiding if action.letter in allowed), Action.RUN)
            for allowed in info.allowed_actions
        )
    )
    request = CompareLatency(plan.text, workload=context.workload, max_seconds=CACHE_SECONDS)
    ((_, result),) = context.run([request])
    if isinstance(result, Failure):
        raise JobFailed(f"the size of the KV cache could not be measured: {result.reason}")
    assert isinstance(result, LatencyComparison)
    context.failed_samples.add("calibration", result.failed_samples)
    run = result.dense_kv_cache_bytes / info.num_layers
    bypassed = sum(action.row.hides_vision for action in plan)
    saved = result.dense_kv_cache_bytes - result.kv_cache_bytes
    return CacheSizes(run, run - saved / bypassed if bypassed else run)
