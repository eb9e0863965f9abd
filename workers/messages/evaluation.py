"""Scores of plans, answers of the dense model, and plans held against other tasks and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .compensation import NO_COMPENSATION, Artifact

if TYPE_CHECKING:
    from workers.tasks import Task

DEFAULT_BATCH_SIZE = 32
"""Samples that are evaluated together; a batch that does not fit into memory is halved."""


@dataclass(frozen=True)
class EvaluatePlans:
    """Score plans on samples ``start`` up to ``n_samples`` (all to the end when ``None``) of a split.

    ``compensation`` is ``"none"`` or the text of a recipe; it holds for all plans. ``path`` is ``"plain"`` (one plan
    after another through ``generate``), ``"fast"`` (work is shared; an error where that is not exact), or ``"auto"``.
    ``artifacts`` gives per plan where its fitted maps lie; without it they are fitted. With ``targets``, the dense
    model's own answer to each of the samples (the end token included; None where it gave none), plans are scored by
    acceptance: the share of an answer's tokens that the plan would have drafted. ``text`` is the general text of a
    recipe that names one. ``task`` names what plans are scored on (``Task.part``): a part of the worker's task, or what
    is beside it; the task itself where it is empty, which a joint task cannot be.

    A passage of general text scores the share of its tokens, from the second on, that the plan predicts as likeliest;
    its ``kl`` is the mean over them.
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
    task: str = ""

    def artifact_of(self, plan: str) -> Artifact | None:
        """Return where the maps of one of the plans lie."""
        return dict(zip(self.plans, self.artifacts, strict=False)).get(plan)


@dataclass(frozen=True)
class AnswerDense:
    """Let the dense model answer samples ``start`` up to ``stop`` of a split greedily.

    ``task`` is that of :class:`EvaluatePlans`, but no text.
    """

    split: str
    start: int
    stop: int
    task: str = ""


@dataclass(frozen=True)
class EvaluateOtherTask:
    """Score a plan on samples ``start`` up to ``n_samples`` of another task's held-out split.

    It is scored with its own maps, never new ones.
    """

    plan: str
    task: Task
    n_samples: int | None = None
    compensation: str = NO_COMPENSATION
    artifact: Artifact | None = None
    start: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Per-sample scores of one plan, in the split's order; failed samples are listed with reasons.

    The score of a failed sample is NaN: it is marked, and left out of means. It is 0 where the failure is the plan's.

    ``secondary`` is the mean under each secondary metric, ``seconds`` the time that the evaluation took.
    A layer execution is one decoder layer run over one sample's prompt (a frozen or bypassed layer counts as one, one
    without attention or MLP by ``ActionRow.executions``): the dense model over n samples takes n * layers.
    ``layer_executions_saved`` are those that sharing work with other plans made unnecessary, so that executions + saved
    = n * (layers that the plan does not skip). Both are rounded to whole ones.
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
    """Ask the dense model about the samples at ``indices`` of a split, and show what it is given and answers.

    ``task`` is that of :class:`EvaluatePlans`, but no text.
    """

    split: str
    indices: tuple[int, ...]
    pictures: bool = False
    task: str = ""


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
