"""Drafting with a plan beside dense: seconds, and whether the answers are dense's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .compensation import NO_COMPENSATION, Artifact
from .latency import DEFAULT_WORKLOAD, LatencyComparison, Workload

if TYPE_CHECKING:
    from workers.tasks import Task


@dataclass(frozen=True)
class CompareSpeculation:
    """Time generation with a plan's drafts against dense, in order-alternating pairs on the same prompts.

    Prompts are held-out samples of the worker's task, or of ``task``, or the beginnings of the paragraphs of ``text``;
    an answer ends by itself, or with the workload's ``new_tokens``. The other fields are those of ``CompareLatency``.
    """

    plan: str
    workload: Workload = DEFAULT_WORKLOAD
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
    """Names of the prompts whose answers with drafts were compared with dense's, and of those that differed.

    At a near tie the dense model alone is undecided between the two tokens, and what follows is not compared;
    ``different`` are differences elsewhere.
    """

    prompts: tuple[str, ...] = ()
    near_ties: tuple[str, ...] = ()
    different: tuple[str, ...] = ()

    def joined(self, other: Exactness) -> Exactness:
        """Join two parts; a prompt that both compared counts once."""
        return Exactness(
            tuple(dict.fromkeys((*self.prompts, *other.prompts))),
            tuple(dict.fromkeys((*self.near_ties, *other.near_ties))),
            tuple(dict.fromkeys((*self.different, *other.different))),
        )


@dataclass(frozen=True)
class SpeculationComparison:
    """Measured speed-ups with a plan's drafts: medians over pairs of dense seconds / its seconds.

    ``latency`` is of requests; its cache is dense's with the drafter's. ``decoding_speedup`` is of all behind a
    request's first token. ``acceptance`` is the share of the positions of dense's own
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
