"""Seconds of requests to an engine that serves dense and plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from .compensation import NO_COMPENSATION, Artifact
from .latency import DEFAULT_WORKLOAD, Workload


@dataclass(frozen=True)
class FindEngine:
    """Find an engine of ``workers.engines`` on the worker's machine, and check that it can be asked about its model."""

    engine: str


@dataclass(frozen=True)
class EngineFound:
    """An engine that is there: its version, those of what it computes with, and the actions that it serves."""

    engine: str
    version: str
    versions: dict[str, str] = field(default_factory=dict)
    letters: str = "RS"


@dataclass(frozen=True)
class CompareEngineLatency:
    """Time a plan against dense, both served by an engine, at every number of ``concurrencies`` of requests at once.

    The other fields are those of ``CompareLatency``; ``max_seconds`` holds for each concurrency.
    """

    plan: str
    engine: str
    concurrencies: tuple[int, ...] = (1,)
    workload: Workload = DEFAULT_WORKLOAD
    precision: float = 0.02
    confidence: float = 0.95
    max_seconds: float = 60.0
    seed: int = 0
    compiled: bool = True
    """Whether the engine may compile; one that treats vision tokens apart does not, and one setting holds for a job."""
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None


@dataclass(frozen=True)
class EngineTimes:
    """Times of a server's requests: medians in seconds, and the throughput over all rounds."""

    first_token_seconds: float
    seconds_per_token: float | None
    """Of each token after the first; None where a request asks for one token."""
    latency_seconds: float
    """Of a whole request."""
    requests_per_second: float


@dataclass(frozen=True)
class EngineLevel:
    """Measured at one concurrency: the speed-up is the median over pairs of rounds of dense seconds / plan seconds.

    A round is one request, or twice as many as are in flight at once.
    """

    concurrency: int
    speedup: float
    speedup_low: float
    speedup_high: float
    rounds: int
    dense: EngineTimes
    plan: EngineTimes


@dataclass(frozen=True)
class EngineComparison:
    """A plan and dense as an engine serves them, with as many bytes for keys and values each."""

    plan: str
    engine: str
    version: str
    device: str
    dtype: str
    workload: Workload
    levels: tuple[EngineLevel, ...]
    kv_cache_bytes: int | None
    dense_kv_cache_tokens: int | None
    """Tokens whose keys and values fit into ``kv_cache_bytes``; all None where the engine does not say."""
    kv_cache_tokens: int | None
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples that were to be asked and whose images do not open."""
