"""What a search sees of a candidate, and what it found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from optimizer.search.pareto import Point, front_indices
from optimizer.search.space import Candidate
from workers.messages import NO_COMPENSATION
from workers.runtime import SkipPlan

OPTIMISM = 1.28
"""Standard errors by which a plan's drop is taken smaller than seen before it is given up (one-sided 90 %)."""


@dataclass(frozen=True)
class Scores:
    """Per-sample scores of a plan on the first ``len(values)`` samples of the search split, or why there are none."""

    values: tuple[float, ...]
    failure: str | None = None
    kl: tuple[float, ...] | None = None
    """Per sample KL(dense || plan) over the answer, NaN where a sample failed; None where it was not measured."""


Evaluate = Callable[[Sequence[tuple[Candidate, int]]], Iterator[tuple[Candidate, Scores]]]
"""Scores candidates on so many samples of the search split; yields in any order, each candidate once."""


@dataclass(frozen=True)
class Tried:
    """A candidate as the search saw it, on the largest prefix it reached."""

    plan: str
    n: int
    accuracy: float
    drop: float
    drop_error: float
    latency_ratio: float
    complete: bool
    """Whether it was evaluated on the whole search split."""
    compensation: str = NO_COMPENSATION
    kl: float | None = None
    """Mean KL(dense || plan) over the samples, None where it was not measured."""
    kl_error: float | None = None
    """Its standard error."""
    from_earlier: bool = False
    """Whether an earlier job evaluated it and this one only took it over."""

    @property
    def candidate(self) -> Candidate:
        """The candidate itself."""
        return Candidate(SkipPlan.parse(self.plan), self.compensation)

    @property
    def optimistic_drop(self) -> float:
        """The smallest drop that the samples seen leave plausible."""
        return self.drop - OPTIMISM * self.drop_error

    @property
    def costs(self) -> Point:
        """Latency ratio and accuracy drop, both to be small."""
        return (self.latency_ratio, self.drop)


@dataclass(frozen=True)
class SearchOutcome:
    """What the search found: every candidate it tried, the failures, and the front of the completely evaluated."""

    dense_accuracy: float
    samples: int
    tried: tuple[Tried, ...]
    failed: dict[str, str] = field(default_factory=dict)
    stopped_because: str = ""
    layer_executions: int = 0
    """What the budget counts: samples times the layers that run, each candidate as if evaluated alone."""

    def front(self) -> tuple[Tried, ...]:
        """Completely evaluated candidates that no other dominates, the fastest first."""
        complete = [tried for tried in self.tried if tried.complete]
        return tuple(complete[index] for index in front_indices([tried.costs for tried in complete]))


def tried_of(candidate: Candidate, scores: Scores, dense: Sequence[float], ratio: float, samples: int) -> Tried:
    """A candidate's figures from its scores and those of the dense model on (at least) the same samples."""
    n = len(scores.values)
    drop, error = paired_drop(dense[:n], scores.values)
    kl, kl_error = _mean_and_error(scores.kl)
    return Tried(
        plan=candidate.plan.text,
        compensation=candidate.compensation,
        n=n,
        accuracy=math.fsum(scores.values) / n,
        drop=drop,
        drop_error=0.0 if candidate.is_dense else error,
        latency_ratio=ratio,
        complete=n == samples,
        kl=kl,
        kl_error=kl_error,
    )


def paired_drop(dense: Sequence[float], plan: Sequence[float]) -> tuple[float, float]:
    """Accuracy drop of ``plan`` against ``dense`` on the same samples, and its standard error.

    The error counts one more lost and one more gained sample than seen, so that it is never zero.
    """
    differences = [d - p for d, p in zip(dense, plan, strict=True)]
    n = len(differences)
    drop = math.fsum(differences) / n
    squares = math.fsum(difference**2 for difference in differences) + 2.0
    return drop, math.sqrt(max(0.0, squares / (n + 2) - drop**2) / (n + 2))


def _mean_and_error(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    """Mean and standard error over the samples that did not fail."""
    known = [value for value in values or () if not math.isnan(value)]
    if not known:
        return None, None
    n = len(known)
    mean = math.fsum(known) / n
    variance = math.fsum((value - mean) ** 2 for value in known) / max(1, n - 1)
    return mean, math.sqrt(variance / n)
