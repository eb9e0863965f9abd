"""Seconds of layers and requests on the live model."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.runtime.plan import Action

from .compensation import NO_COMPENSATION, Artifact


@dataclass(frozen=True)
class Workload:
    """The serving situation that latency is measured for: prompts of the task itself, ``batch_size`` at a time."""

    batch_size: int = 1
    new_tokens: int = 4


DEFAULT_WORKLOAD = Workload()


@dataclass(frozen=True)
class ProfileLatency:
    """Time every layer and action of the model on this worker's device (no other worker may run meanwhile).

    With ``verify`` the dense model's passes over several new tokens are timed as well.
    """

    actions: str = Action.RUN.letter + Action.SKIP.letter
    repeats: int = 20
    workload: Workload = DEFAULT_WORKLOAD
    verify: bool = False


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds of one request's prefill plus decode: the dense model, and each layer under each action.

    ``prefill_seconds[letter][layer]`` is the layer's part in the prefill under that action, ``decode_seconds`` its part
    in each token after the first; ``dense_prefill_seconds`` and ``dense_decode_seconds`` are the whole model's.
    """

    device: str
    workload: Workload
    prompt_tokens: int
    dense_latency_seconds: float
    dense_prefill_seconds: float
    dense_decode_seconds: float
    prefill_seconds: dict[str, tuple[float, ...]]
    decode_seconds: dict[str, tuple[float, ...]]
    relative_error: float
    """Median absolute error of the additive prediction over the check plans, relative to their measured time."""
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples whose prompts were to be timed and could not be made."""
    verify_seconds: tuple[float, ...] = ()
    """Of the dense model over 1, 2, ... new tokens behind a cache, where that was asked for."""

    @property
    def layer_seconds(self) -> dict[str, tuple[float, ...]]:
        """Return each layer's part of the whole request in seconds, by action letter and layer.

        A plan's predicted time is ``dense_latency_seconds - sum(layer_seconds["R"][l] - layer_seconds[action][l])``.
        """
        tokens = self.workload.new_tokens - 1
        return {
            letter: tuple(p + tokens * d for p, d in zip(prefill, self.decode_seconds[letter], strict=True))
            for letter, prefill in self.prefill_seconds.items()
        }


@dataclass(frozen=True)
class CompareLatency:
    """Time a plan against dense in interleaved, order-alternating pairs until the ratio's interval is narrow enough.

    ``precision`` is that width relative to the ratio, ``confidence`` the interval's level, ``max_seconds`` the most
    time it may take. Without an ``artifact`` the plan's maps are fitted.
    """

    plan: str
    workload: Workload = DEFAULT_WORKLOAD
    precision: float = 0.02
    confidence: float = 0.95
    max_seconds: float = 60.0
    seed: int = 0
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None


@dataclass(frozen=True)
class LatencyComparison:
    """Measured speed-up: the median over pairs of dense seconds / plan seconds, with a bootstrap interval."""

    plan: str
    device: str
    workload: Workload
    dense_latency_seconds: float
    latency_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    pairs: int
    dense_kv_cache_bytes: int
    kv_cache_bytes: int
    dense_peak_bytes: int | None = None
    """Most memory in use during a request beyond what was in use before it; None where the system does not tell."""
    peak_bytes: int | None = None
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples whose prompts were to be timed and could not be made."""
