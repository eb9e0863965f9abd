"""Requests to workers and their replies: frozen values, from loading to maps and guards.

A request says what to measure, a reply holds what was measured. Everything here pickles small and imports nothing
heavy, so that the driver and the command line can use it without torch. Plans are given by their text, times are in
seconds, memory is in bytes, accuracies and scores lie in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.runtime.plan import Action

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .tasks import Task

TOKEN_GROUPS = ("vision", "text", "all")
DEFAULT_BATCH_SIZE = 32
"""Samples that are evaluated together; a batch that does not fit into memory is halved."""

NO_COMPENSATION = "none"
"""In place of a recipe's text: the skips of a plan stay plain."""


# --- Loading ---
@dataclass(frozen=True)
class ModelSource:
    """Name a model and how it is loaded.

    ``path`` is a directory, the name of a bundled reference model, or a hub id. ``device`` is ``"auto"`` (a GPU if
    the worker holds one, else the CPU), ``"cpu"`` or ``"cuda"``. ``dtype`` is a torch dtype name or ``"auto"`` (the
    checkpoint's own; workers take float32 where their device would emulate that). ``allow_pickle`` names pickled weight
    files that may be read where there are no safetensors.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    allow_pickle: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerInfo:
    """Describe a worker that is ready, and the model it holds."""

    worker: int
    node: str
    device: str
    threads: int
    model_family: str
    fingerprint: str
    num_layers: int
    allowed_actions: tuple[str, ...]
    """Per layer the letters of the actions it may take, for example ``"RS"``."""
    parameters: int
    dtype: str
    process: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    hint: str = ""
    """One-line performance hint; empty if there is none."""
    weight_bytes: int = 0
    folded_bytes: tuple[int, ...] = ()
    """Per layer, the bytes of the projections that a map is folded into; 0 where none can be."""


@dataclass(frozen=True)
class Artifact:
    """Name a file of fitted maps, which is too large for the database: a path or an fsspec URL, and its SHA-256."""

    location: str
    checksum: str


# --- Evaluation ---
@dataclass(frozen=True)
class EvaluatePlans:
    """Score plans on samples ``start`` up to ``n_samples`` (all to the end when ``None``) of a split.

    ``compensation`` is ``"none"`` or the text of a recipe; it holds for all plans. ``path`` is ``"plain"`` (one plan
    after another through ``generate``), ``"fast"`` (work is shared; an error where that is not exact), or ``"auto"``.
    ``artifacts`` gives per plan where its fitted maps lie; without it they are fitted. With ``targets``, the dense
    model's own answer to each of the samples (the end token included; None where it gave none), plans are scored by
    acceptance: the share of an answer's tokens that the plan would have drafted. ``text`` is the general text of a
    recipe that names one.
    """

    plans: tuple[str, ...]
    split: str
    n_samples: int | None = None
    compensation: str = NO_COMPENSATION
    start: int = 0
    path: str = "auto"
    artifacts: tuple[Artifact | None, ...] = ()
    targets: tuple[tuple[int, ...] | None, ...] = ()
    text: str | None = None

    def artifact_of(self, plan: str) -> Artifact | None:
        """Return where the maps of one of the plans lie."""
        return dict(zip(self.plans, self.artifacts, strict=False)).get(plan)


@dataclass(frozen=True)
class AnswerDense:
    """Let the dense model answer samples ``start`` up to ``stop`` of a split greedily."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class EvaluateOtherTask:
    """Score a plan on the first ``n_samples`` held-out samples of another task, with its own maps, never new ones."""

    plan: str
    task: Task
    n_samples: int | None = None
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Evaluation:
    """Per-sample scores of one plan, in the split's order; failed samples are listed with reasons.

    The score of a failed sample is NaN: it is marked, and left out of means. It is 0 where the failure is the plan's.

    ``secondary`` is the mean under each secondary metric, ``seconds`` the time that the evaluation took.
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
    compensation: str = NO_COMPENSATION
    kl: tuple[float, ...] | None = None
    """Per sample the mean over the answer's positions of KL(dense || plan), in nats; NaN where a sample failed.
    None where the path does not measure it."""
    layer_executions: int = 0
    layer_executions_saved: int = 0
    path: str = "plain"
    near_ties: int = 0
    """Samples whose score hung on two logits closer than rounding and were therefore decided by the plain path."""

    @property
    def n_samples(self) -> int:
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """The mean over the samples that are not marked."""
        answered = [score for score in self.scores if score == score]
        return sum(answered) / len(answered) if answered else float("nan")


@dataclass(frozen=True)
class DenseAnswers:
    """Reply to :class:`AnswerDense`: what the answers score, and their tokens up to the one that ends them.

    None where a sample failed.
    """

    evaluation: Evaluation
    tokens: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class EvaluationFailure:
    """Reason why one plan of an :class:`EvaluatePlans` has no scores."""

    plan: str
    reason: str


@dataclass(frozen=True)
class Evaluations:
    """One entry per plan of an :class:`EvaluatePlans`, in its order; ``note`` says why the fast path was not taken."""

    results: tuple[Evaluation | EvaluationFailure, ...]
    note: str = ""
    failed_calibration: dict[str, str] = field(default_factory=dict)
    """Calibration samples that the maps were fitted without, and why."""


@dataclass(frozen=True)
class ShowSamples:
    """Ask the dense model about the samples at ``indices`` of a split, and show what it is given and answers."""

    split: str
    indices: tuple[int, ...]
    pictures: bool = False


@dataclass(frozen=True)
class ShownSample:
    """One sample as the model sees it: the prompt after its chat template, and what the dense model answers."""

    id: str
    prompt: str
    """The prompt's tokens as text; a run of image tokens stands as one."""
    prompt_tokens: int
    vision_tokens: int
    accepted: tuple[str, ...]
    choices: tuple[str, ...] = ()
    answer: str | None = None
    """None where the sample failed."""
    score: float | None = None
    cut: bool = False
    """Whether ``max_new_tokens`` ended the answer."""
    failure: str = ""
    image: str = ""
    """Sizes in words: of the image, and of what the processor makes of it."""
    picture: bytes = b""
    """What the processor makes of the image, as PNG; empty where it cannot be drawn or was not asked for."""


@dataclass(frozen=True)
class ShownSamples:
    """Reply to :class:`ShowSamples`, in its order."""

    samples: tuple[ShownSample, ...]


@dataclass(frozen=True)
class CompareText:
    """Compare a plan's next-token distributions on general text with the dense model's."""

    plan: str
    text: str
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None


@dataclass(frozen=True)
class TextDivergence:
    """Mean over ``tokens`` predicted tokens, in nats: KL(dense || plan), and the negative log-likelihoods."""

    plan: str
    tokens: int
    kl: float
    dense_loss: float
    plan_loss: float


# --- Latency ---
@dataclass(frozen=True)
class Workload:
    """The serving situation that latency is measured for: prompts of the task itself, ``batch_size`` at a time."""

    batch_size: int = 1
    new_tokens: int = 4


@dataclass(frozen=True)
class ProfileLatency:
    """Time every layer and action of the model on this worker's device (no other worker may run meanwhile).

    With ``verify`` the dense model's passes over several new tokens are timed as well.
    """

    actions: str = Action.RUN.letter + Action.SKIP.letter
    repeats: int = 20
    workload: Workload = Workload()
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
    workload: Workload = Workload()
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


# --- Speculation ---
@dataclass(frozen=True)
class CompareSpeculation:
    """Time generation with a plan's drafts against dense, in order-alternating pairs on the same prompts.

    Prompts are held-out samples of the worker's task, or of ``task``, or the beginnings of the paragraphs of ``text``;
    an answer ends by itself, or with the workload's ``new_tokens``. The other fields are those of ``CompareLatency``.
    """

    plan: str
    workload: Workload = Workload()
    precision: float = 0.02
    confidence: float = 0.95
    max_seconds: float = 60.0
    seed: int = 0
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None
    task: Task | None = None
    text: str | None = None


@dataclass(frozen=True)
class CheckSpeculation:
    """Compare what is generated with a plan's drafts with the dense model's own answers, ``targets``, token by token.

    They are of samples ``start`` up to ``stop`` of the held-out split; None where dense gave none.
    """

    plan: str
    start: int
    stop: int
    targets: tuple[tuple[int, ...] | None, ...]
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Exactness:
    """How many answers with drafts were compared with dense's, and which differed.

    At a near tie the dense model alone is undecided between the two tokens; ``different`` are differences elsewhere.
    """

    answers: int
    near_ties: tuple[str, ...] = ()
    different: tuple[str, ...] = ()

    def joined(self, other: Exactness) -> Exactness:
        """Join two parts; a prompt that both compared counts twice."""
        return Exactness(
            self.answers + other.answers,
            tuple(dict.fromkeys((*self.near_ties, *other.near_ties))),
            tuple(dict.fromkeys((*self.different, *other.different))),
        )


@dataclass(frozen=True)
class SpeculationComparison:
    """Measured speed-ups with a plan's drafts: medians over pairs of dense seconds / its seconds.

    ``latency`` is of requests; its cache is dense's with the drafter's. ``decoding_speedup`` is of all behind a
    request's first token, the drafter's prefill included. ``acceptance`` is the share of the positions of dense's own
    answers where the plan's next token is dense's. Counts are of the timed requests.
    """

    latency: LatencyComparison
    decoding_speedup: float
    decoding_speedup_low: float
    decoding_speedup_high: float
    dense_seconds_per_token: float
    """Of each token behind the first."""
    seconds_per_token: float
    acceptance: float
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    plain_steps: int
    extra_bytes: int
    """Beside the dense model and its cache: folded weights, and the drafter's cache."""
    exactness: Exactness


# --- Latency in an engine ---
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
    workload: Workload = Workload()
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


# --- Redundancy ---
@dataclass(frozen=True)
class MeasureRedundancy:
    """Measure ``kinds`` over ``samples[:n_samples][shard::shards]`` of the calibration split (None: all).

    ``kinds`` are names of ``workers.redundancy.kinds.KINDS``.
    """

    kinds: tuple[str, ...]
    shard: int
    shards: int
    n_samples: int | None = None


@dataclass(frozen=True)
class KindSums:
    """Sums of one kind of measurement over one shard.

    ``added`` arrays are summed when shards are merged, ``gathered`` ones laid end to end along their first axis (a row
    per sample; only states of single tokens are small enough for that). ``refused`` says why a layer has none.
    """

    added: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    gathered: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RedundancySums:
    """Sums of every kind over one shard of the calibration split, and the layer executions they cost."""

    num_layers: int
    samples: int
    kinds: dict[str, KindSums]
    layer_executions: dict[str, int]
    """Decoder layers run, times samples, by the pass that ran them: states, attention, propagation, causal, ..."""
    notes: tuple[str, ...] = ()
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples that were left out, and why."""

    @property
    def forward_passes(self) -> dict[str, float]:
        """Forward passes per sample, by pass: layer executions over those of one dense pass of all samples."""
        whole = max(1, self.samples * self.num_layers)
        return {name: executions / whole for name, executions in self.layer_executions.items()}


# --- Compensation ---
@dataclass(frozen=True)
class FitCompensation:
    """Fit the maps of a plan's gaps on the calibration split; ``compensation`` is the text of a recipe.

    ``text`` is the general text of a recipe that names one.
    """

    plan: str
    compensation: str
    text: str | None = None


@dataclass(frozen=True)
class GapShare:
    """Shares of the dense model's state behind a gap (energy, calibration tokens) that are left unexplained.

    The gap lies behind ``layer`` and ends with the skipped layer ``end``. ``plain_share`` is left by the plain skip,
    the gaps below being compensated, and ``unexplained`` by the best map.
    """

    layer: int
    end: int
    plain_share: float
    unexplained: float


@dataclass(frozen=True)
class FittedCompensation:
    """A plan's fitted maps as the content of a safetensors file, how well they fit, and the time that fitting took."""

    plan: str
    compensation: str
    content: bytes
    gaps: tuple[GapShare, ...]
    tokens: int
    text_tokens: int
    """Of these, tokens of general text."""
    samples: int
    seconds: float
    failed_samples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasureLinearRedundancy:
    """Measure the linear redundancy of all pairs of layers on the calibration split; ``ridge`` as in a recipe."""

    ridge: float = 1e-3


@dataclass(frozen=True)
class LinearRedundancy:
    """Unexplained shares by kept and last skipped layer, over so many calibration tokens, and why layers have none."""

    shares: tuple[GapShare, ...]
    tokens: int
    refusals: dict[int, str]
    failed_samples: dict[str, str] = field(default_factory=dict)


# --- Guard ---
@dataclass(frozen=True)
class FitGuards:
    """Fit guards that read where ``layers`` begin, at a rate of false alarms, and measure what they send away.

    Beside the task's own held-out samples ask those of other ``tasks`` and pieces of ``text`` about the task's images,
    at most ``samples`` of each.
    """

    layers: tuple[int, ...]
    false_alarms: float
    tasks: tuple[Task, ...] = ()
    text: str | None = None
    samples: int | None = None


@dataclass(frozen=True)
class SentAway:
    """Prompts that were asked, and how many of them a guard sends to the dense model."""

    prompts: int
    sent: int

    @property
    def share(self) -> float:
        """The share that is sent to the dense model; NaN of none."""
        return self.sent / self.prompts if self.prompts else float("nan")


@dataclass(frozen=True)
class FittedGuard:
    """A fitted guard as the content of a safetensors file, and what was measured of it.

    ``decision_seconds`` are from a prompt's inputs to the decision, ``score_seconds`` those of the score alone.
    """

    layer: int
    content: bytes
    fitted_on: int
    threshold_on: int
    held_out: SentAway
    tasks: dict[str, SentAway]
    text: SentAway | None
    decision_seconds: float
    score_seconds: float


@dataclass(frozen=True)
class FittedGuards:
    """Reply to :class:`FitGuards`, in the order of its layers, and why samples were left out, by split."""

    guards: tuple[FittedGuard, ...]
    failed_samples: dict[str, dict[str, str]] = field(default_factory=dict)


Timing = ProfileLatency | CompareLatency | CompareSpeculation | CompareEngineLatency
"""Requests that measure time: no other worker may use the device meanwhile."""

Request = (
    Timing
    | FindEngine
    | CheckSpeculation
    | EvaluatePlans
    | AnswerDense
    | EvaluateOtherTask
    | ShowSamples
    | CompareText
    | MeasureRedundancy
    | FitCompensation
    | MeasureLinearRedundancy
    | FitGuards
)
Reply = (
    Evaluations
    | DenseAnswers
    | Evaluation
    | ShownSamples
    | TextDivergence
    | LatencyProfile
    | LatencyComparison
    | SpeculationComparison
    | Exactness
    | EngineFound
    | EngineComparison
    | RedundancySums
    | FittedCompensation
    | LinearRedundancy
    | FittedGuards
)


@dataclass(frozen=True)
class Failure:
    """A request that raised or whose worker died; the job goes on and records the reason."""

    request: Request
    reason: str
    attempts: int
