"""One evaluated candidate of a search, and the outcome of the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from optimizer.search.pareto import Point, front_indices
from optimizer.search.space import Candidate
from workers.messages import NO_COMPENSATION
from workers.runtime import SkipPlan

OPTIMISM = 1.28
"""Standard errors by which a plan's difference is taken better than seen before it is given up (one-sided 90 %)."""


@dataclass(frozen=True)
class Scores:
    """Per-sample scores of a plan on the first ``len(values)`` samples of the search split, or why there are none.

    NaN stands for a sample that failed.
    """

    values: tuple[float, ...]
    failure: str | None = None
    kl: tuple[float, ...] | None = None
    """Per sample KL(dense || plan) over the answer, NaN where a sample failed; None where it was not measured."""
    secondary: Mapping[str, float] = field(default_factory=dict)
    """Means of the secondary metrics; in a lossless job those of the rounds that drafting takes."""
    by_goal: Mapping[str, Scores] = field(default_factory=dict)
    """Where a job has several goals, the scores on each, and none here."""

    @property
    def n_samples(self) -> int:
        """Samples scored, of all goals together."""
        return len(self.values) + sum(each.n_samples for each in self.by_goal.values())


Evaluate = Callable[[Sequence[tuple[Candidate, int]]], Iterator[tuple[Candidate, Scores]]]
"""Scores candidates on so many samples of the search split; yields in any order, each candidate once."""


@dataclass(frozen=True)
class DraftValue:
    """Hold what decoding takes with a candidate as drafter (:mod:`optimizer.search.drafting`)."""

    time: float
    """Expected time per token, as a share of plain decoding."""
    optimistic_time: float
    """The least that the samples seen leave plausible, and the most."""
    pessimistic_time: float
    memory: float
    """Extra memory, as a share of the dense model's."""
    draft_length: int
    """Tokens drafted in a round, at which the time is least."""


@dataclass(frozen=True)
class GoalFigures:
    """A candidate's loss on one of a job's goals (:mod:`optimizer.search.goals`)."""

    name: str
    n_samples: int
    accuracy: float
    loss: float
    """Accuracy lost against dense on the same samples, as a share; of text the divergence, in nats a token."""
    error: float
    """Standard error of the loss."""
    limit: float | None
    weight: float
    is_text: bool = False


@dataclass(frozen=True)
class Trial:
    """A candidate as the search saw it, on the largest prefix of the search split that it reached.

    In a lossless job its accuracy is its acceptance, and the dense model's is 1.
    """

    plan: str
    n_samples: int
    accuracy: float
    difference: float
    """Accuracy minus that of the dense model on the same samples: a loss is negative."""
    difference_error: float
    """Standard error of the difference."""
    latency_ratio: float
    complete: bool
    """Whether it was evaluated on the whole search split."""
    compensation: str = NO_COMPENSATION
    kl: float | None = None
    """Mean KL(dense || plan) over the samples, None where it was not measured."""
    kl_error: float | None = None
    """Standard error of the KL."""
    from_earlier: bool = False
    """Whether an earlier job evaluated it and this one only took it over."""
    drafter: DraftValue | None = None
    """In a lossless job."""
    goals: tuple[GoalFigures, ...] = ()
    """In a job with several; ``difference`` is then minus what the search minimises, ``accuracy`` a weighted mean."""

    @property
    def candidate(self) -> Candidate:
        """The plan with its compensation."""
        return Candidate(SkipPlan.parse(self.plan), self.compensation)

    @property
    def optimistic_difference(self) -> float:
        """The largest difference that the samples seen leave plausible."""
        return self.difference + OPTIMISM * self.difference_error

    @property
    def costs(self) -> Point:
        """Latency ratio and loss of accuracy, in a lossless job extra memory and time per token; to be minimised."""
        if self.drafter is not None:
            return (self.drafter.memory, self.drafter.time)
        return (self.latency_ratio, -self.difference)


@dataclass(frozen=True)
class SearchOutcome:
    """Every candidate that a search evaluated, the failures, and why it stopped."""

    dense_accuracy: float
    n_samples: int
    trials: tuple[Trial, ...]
    failed: dict[str, str] = field(default_factory=dict)
    stopped_because: str = ""
    layer_executions: int = 0
    """As the budget counts them, each candidate as if evaluated alone."""

    def front(self) -> tuple[Trial, ...]:
        """Return the front of the trials."""
        return front_of(self.trials)


def front_of(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return the complete trials that no other complete one dominates, those of the least first cost first."""
    complete = [trial for trial in trials if trial.complete]
    return tuple(complete[index] for index in front_indices([trial.costs for trial in complete]))


def trial_of(candidate: Candidate, scores: Scores, dense: Scores, ratio: float, n_samples: int) -> Trial:
    """Compute a candidate's figures from its scores and those of the dense model on (at least) the same samples.

    ``ratio`` is its predicted latency as a share of dense, ``n_samples`` the size of the search split.
    """
    n = len(scores.values)
    its_dense, values = answered_by_both(dense.values[:n], scores.values)
    difference, error = paired_difference(its_dense, values)
    kl, kl_error = mean_and_error(scores.kl)
    return Trial(
        plan=candidate.plan.text,
        compensation=candidate.compensation,
        n_samples=n,
        accuracy=math.fsum(values) / len(values),
        difference=difference,
        difference_error=0.0 if candidate.is_dense else error,
        latency_ratio=ratio,
        complete=n == n_samples,
        kl=kl,
        kl_error=kl_error,
    )


def answered_by_both(dense: Sequence[float], plan: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the scores of both on the samples that neither failed on; ``dense`` as long as ``plan``."""
    pairs = [pair for pair in zip(dense, plan, strict=True) if not any(map(math.isnan, pair))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def paired_difference(dense: Sequence[float], plan: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``plan`` minus ``dense`` over the same samples, and its standard error.

    The error counts one more lost and one more gained sample than seen, so that it is never zero.
    """
    differences = [p - d for d, p in zip(dense, plan, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    squares = math.fsum(difference**2 for difference in differences) + 2.0
    return mean, math.sqrt(max(0.0, squares / (n + 2) - mean**2) / (n + 2))


def mean_and_error(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    """Return mean and standard error over the samples that did not fail."""
    known = [value for value in values or () if not math.isnan(value)]
    if not known:
        return None, None
    n = len(known)
    mean = math.fsum(known) / n
    variance = math.fsum((value - mean) ** 2 for value in known) / max(1, n - 1)
    return mean, math.sqrt(variance / n)
