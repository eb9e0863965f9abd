"""Frozen values between the driver and the workers.

A request says what to measure, a reply holds what was measured. Everything here pickles small and imports nothing
heavy, so that the driver and the command line can use it without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum, nan, sqrt

SPLITS = ("calibration", "search", "held_out")
TOKEN_GROUPS = ("vision", "text", "all")


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
    dtype: str
    process: int = 0
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

    With d the cosine distance between a layer's input and output state at a token, s the sum of d over a sample's
    tokens and n their number: ``distance_sum`` sums d, ``distance_squares`` d^2 (both over tokens),
    ``sample_squares`` s^2, ``sample_products`` s * n, ``token_squares`` n^2 (over samples), ``tokens`` n.
    """

    distance_sum: dict[str, tuple[float, ...]]
    distance_squares: dict[str, tuple[float, ...]]
    sample_squares: dict[str, tuple[float, ...]]
    sample_products: dict[str, tuple[float, ...]]
    tokens: dict[str, int]
    token_squares: dict[str, int]
    samples: int

    @classmethod
    def merge(cls, shards: Sequence[RedundancySums]) -> RedundancySums:
        """Add shards up; their order does not matter. Raises ValueError when there are none."""
        if not shards:
            raise ValueError("there is nothing to merge: give at least one shard")

        def add(name: str) -> dict[str, tuple[float, ...]]:
            sums = [getattr(shard, name) for shard in shards]
            return {g: tuple(fsum(layer) for layer in zip(*(s[g] for s in sums), strict=True)) for g in TOKEN_GROUPS}

        return cls(
            distance_sum=add("distance_sum"),
            distance_squares=add("distance_squares"),
            sample_squares=add("sample_squares"),
            sample_products=add("sample_products"),
            tokens={group: sum(shard.tokens[group] for shard in shards) for group in TOKEN_GROUPS},
            token_squares={group: sum(shard.token_squares[group] for shard in shards) for group in TOKEN_GROUPS},
            samples=sum(shard.samples for shard in shards),
        )

    def mean(self, group: str) -> tuple[float, ...]:
        """Mean distance per layer over the group's tokens; NaN when it has none."""
        count = self.tokens[group]
        return tuple(total / count if count else nan for total in self.distance_sum[group])

    def standard_error(self, group: str) -> tuple[float, ...]:
        """Standard error of :meth:`mean` per layer, with samples as the independent units (tokens of one are not).

        The ratio estimator's variance, sum over samples of (s - mean * n)^2 / (sum of n)^2, times the finite-sample
        factor samples / (samples - 1) (Cochran 1977, section 6.4). NaN below two samples.
        """
        count, samples = self.tokens[group], self.samples
        if not count or samples < 2:
            return tuple(nan for _ in self.distance_sum[group])
        errors = []
        for layer, mean in enumerate(self.mean(group)):
            residual = (
                self.sample_squares[group][layer]
                - 2 * mean * self.sample_products[group][layer]
                + mean * mean * self.token_squares[group]
            )
            errors.append(sqrt(max(0.0, residual) * samples / (samples - 1)) / count)
        return tuple(errors)


@dataclass(frozen=True)
class EvaluatePlan:
    """Score a plan on the first ``limit`` samples of a split (all of them when ``None``)."""

    plan: str
    split: str
    limit: int | None = None


@dataclass(frozen=True)
class EvaluatePlans:
    """Score plans on samples ``start`` up to ``limit`` (all to the end when ``None``) of a split.

    ``compensation`` is ``"none"`` or the text of a recipe; it holds for all plans. ``path`` is ``"plain"`` (one plan
    after another through ``generate``), ``"fast"`` (work is shared; an error where that is not exact), or ``"auto"``.
    """

    plans: tuple[str, ...]
    split: str
    limit: int | None = None
    compensation: str = "none"
    start: int = 0
    path: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """Per-sample scores of one plan, in the split's order; failed samples are listed, and score 0.

    A layer execution is one decoder layer run over one sample's prompt (a frozen or bypassed layer counts as one):
    the dense model over n samples takes n * layers. ``layer_executions_saved`` are those that sharing work with other
    plans made unnecessary, so that executions + saved = n * (layers that the plan does not skip).
    """

    plan: str
    split: str
    sample_ids: tuple[str, ...]
    scores: tuple[float, ...]
    secondary: dict[str, float]
    failed_samples: dict[str, str]
    seconds: float
    compensation: str = "none"
    kl: tuple[float, ...] | None = None
    """Per sample the mean over the answer's positions of KL(dense || plan), in nats; NaN where a sample failed.
    None where the path does not measure it."""
    layer_executions: int = 0
    layer_executions_saved: int = 0
    path: str = "plain"
    near_ties: int = 0
    """Samples whose score hung on two logits closer than rounding and were therefore decided by the plain path."""

    @property
    def n(self) -> int:
        """Number of scored samples."""
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """Mean score in [0, 1]."""
        return sum(self.scores) / len(self.scores) if self.scores else float("nan")


@dataclass(frozen=True)
class EvaluationFailure:
    """Why one plan of an :class:`EvaluatePlans` has no scores."""

    plan: str
    reason: str


@dataclass(frozen=True)
class Evaluations:
    """One entry per plan of an :class:`EvaluatePlans`, in its order; ``note`` says why the fast path was not taken."""

    results: tuple[Evaluation | EvaluationFailure, ...]
    note: str = ""


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


Request = ProfileLatency | ScoreRedundancy | EvaluatePlan | EvaluatePlans | CompareLatency
Reply = LatencyProfile | RedundancySums | Evaluation | Evaluations | LatencyComparison


@dataclass(frozen=True)
class Failure:
    """A request that raised or whose worker died; the job goes on and records the reason."""

    request: Request
    reason: str
    attempts: int
