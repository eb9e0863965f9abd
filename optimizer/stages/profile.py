"""Stage 1: measure how long every layer takes under every action, on this device and workload."""

from __future__ import annotations

from optimizer.search.latency import LayerCounts, LayerTimes
from optimizer.stages.context import JobContext
from storage.records import measurements
from workers.messages import LatencyProfile, ProfileLatency


def run(context: JobContext) -> LayerTimes:
    """Measure the profile on one worker while the others wait, or read it back; nothing where layers are counted."""
    if context.spec.search.latency == "layers":
        return LayerCounts.of(context.worker.num_layers, context.spec.letters)
    context.progress.begin("profile latency", 1)
    profile = context.once("profile", LatencyProfile, lambda: _measure(context))
    context.progress.advance(news=f"dense {profile.dense_seconds * 1000:.1f} ms a request")
    return profile


def _measure(context: JobContext) -> LatencyProfile:
    ((_, profile),) = context.ask([ProfileLatency(actions=context.spec.letters, workload=context.workload)])
    assert isinstance(profile, LatencyProfile)
    device_id = measurements.ensure_device(context.db, name=profile.device)
    measurements.record_latency(
        context.db,
        context.job,
        measurements.LatencyProfile(
            model_id=context.model_id,
            task_id=context.task_id,
            device_id=device_id,
            workload=context.workload_name,
            prompt_tokens=profile.prompt_tokens,
            dense_seconds=profile.dense_seconds,
            layer_seconds=profile.layer_seconds,
            phases={
                "prefill": {"dense": profile.dense_prefill_seconds, **profile.prefill_seconds},
                "decode": {"dense": profile.dense_decode_seconds, **profile.decode_seconds},
            },
            relative_error=profile.relative_error,
        ),
    )
    return profile
