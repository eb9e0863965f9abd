"""Frozen values between the driver and the workers.

A request says what to measure, a reply holds what was measured. Everything here pickles small and imports nothing
heavy, so that the driver and the command line can use it without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SPLITS = ("calibration", "search", "held_out")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and how it is loaded.

    ``path`` is a directory, the name of a bundled reference model, or a hub id. ``device`` is ``"auto"`` (a GPU if
    the worker holds one, else the CPU), ``"cpu"`` or ``"cuda"``. ``dtype`` is a torch dtype name or ``"auto"`` (the
    checkpoint's own).
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Workload:
    """The serving situation that latency is measured for: prompts of the task itself, ``batch_size`` at a time."""

    batch_size: int = 1
    new_tokens: int = 4


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says about itself and the model it holds, once it is ready."""

    worker: int
    node: str
    device: str
    threads: int
    model_family: str
    model_fingerprint: str
    num_layers: int
    allowed_actions: tuple[str, ...]
    """Per layer the letters of the actions it may take, for example ``"RS"``."""
    parameters: int
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileLatency:
    """Time every layer and action of the model on this worker's device (no other worker may run meanwhile)."""

    actions: str = "RS"
    repeats: int = 20
    workload: Workload = Workload()


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds of one request's prefill plus decode: the dense model, and each layer under each action.

    ``layer_seconds[letter][layer]`` is the layer's contribution under that action, so that a plan's predicted time
    is ``dense_seconds - sum(layer_seconds["R"][l] - layer_seconds[action][l])``.
    """

    device: str
    workload: Workload
    prompt_tokens: int
    dense_seconds: float
    layer_seconds: dict[str, tuple[float, ...]]
    relative_error: float
    """Median absolute error of the additive prediction over the check plans, relative to their measured time."""


@dataclass(frozen=True)
class ScoreRedundancy:
    """Accumulate redundancy statistics over ``samples[shard::shards]`` of the calibration split."""

    shard: int
    shards: int


@dataclass(frozen=True)
class RedundancySums:
    """Running sums over tokens, per layer and token group (``"vision"``, ``"text"``, ``"all"``), exact to merge.

    ``distance_sum[group][layer]`` sums the cosine distance between the layer's input and output state,
    ``distance_squares`` its square, ``tokens[group]`` counts the tokens.
    """

    distance_sum: dict[str, tuple[float, ...]]
    distance_squares: dict[str, tuple[float, ...]]
    tokens: dict[str, int]
    samples: int


@dataclass(frozen=True)
class EvaluatePlan:
    """Score a plan on the first ``limit`` samples of a split (all of them when ``None``)."""

    plan: str
    split: str
    limit: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Per-sample scores of one plan, in the split's order; failed samples are listed, and score 0."""

    plan: str
    split: str
    sample_ids: tuple[str, ...]
    scores: tuple[float, ...]
    secondary: dict[str, float]
    failed_samples: dict[str, str]
    seconds: float

    @property
    def n(self) -> int:
        """Number of scored samples."""
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """Mean score in [0, 1]."""
        return sum(self.scores) / len(self.scores) if self.scores else float("nan")


@dataclass(frozen=True)
class CompareLatency:
    """Time a plan against dense in interleaved, order-alternating pairs until the ratio's interval is narrow enough."""

    plan: str
    workload: Workload = Workload()
    precision: float = 0.02
    confidence: float = 0.95
    max_seconds: float = 60.0
    seed: int = 0


@dataclass(frozen=True)
class LatencyComparison:
    """Measured speed-up: the median over pairs of dense seconds / plan seconds, with a bootstrap interval."""

    plan: str
    device: str
    workload: Workload
    dense_seconds: float
    plan_seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    pairs: int
    kv_cache_bytes_dense: int
    kv_cache_bytes_plan: int


Request = ProfileLatency | ScoreRedundancy | EvaluatePlan | CompareLatency
Reply = LatencyProfile | RedundancySums | Evaluation | LatencyComparison


@dataclass(frozen=True)
class Failure:
    """A request that raised or whose worker died; the job goes on and records the reason."""

    request: Request
    reason: str
    attempts: int
