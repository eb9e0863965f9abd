"""Predicted latency of a plan: the additive model over the per-layer profile. Steers the search, is never published."""

from __future__ import annotations

from workers.messages import LatencyProfile
from workers.runtime import SkipPlan


def latency_ratio(profile: LatencyProfile, plan: SkipPlan) -> float:
    """Predicted request time of ``plan`` as a share of the dense model's; lower is faster, 1.0 is dense.

    A layer whose action was measured slower than running it (noise, or a real overhead) counts as it was measured.
    """
    running = profile.layer_seconds["R"]
    saved = sum(
        running[layer] - profile.layer_seconds[action.value][layer]
        for layer, action in enumerate(plan)
        if action.value != "R"
    )
    # Measured layer times can add up to more than the whole by noise; a request never takes no time at all.
    return max(0.01, 1.0 - saved / profile.dense_seconds)
