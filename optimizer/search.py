"""The search loop: propose plans in batches, evaluate them on growing prefixes of the search split, keep the front.

A plan starts on the first rung (the smallest prefix). It goes on to the next only while it could still reach the
front under the constraint. Everything is decided from paired differences to the dense model on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from optimizer.job import ConstraintSpec, SearchSpec
from optimizer.pareto import Point, front_indices
from optimizer.proposals import Proposals
from optimizer.space import PlanSpace, touched
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


Evaluate = Callable[[Sequence[tuple[SkipPlan, int]]], Iterator[tuple[SkipPlan, Scores]]]
"""Scores plans on so many samples of the search split; yields in any order, each plan once."""


@dataclass(frozen=True)
class Tried:
    """A plan as the search saw it, on the largest prefix it reached."""

    plan: str
    n: int
    accuracy: float
    drop: float
    drop_error: float
    latency_ratio: float
    complete: bool
    """Whether it was evaluated on the whole search split."""

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
    """What the search found: every plan it tried, the failures, and the front of the completely evaluated ones."""

    dense_accuracy: float
    samples: int
    tried: tuple[Tried, ...]
    failed: dict[str, str] = field(default_factory=dict)
    stopped_because: str = ""

    def front(self) -> tuple[Tried, ...]:
        """Completely evaluated plans that no other dominates, the fastest first."""
        complete = [tried for tried in self.tried if tried.complete]
        return tuple(complete[index] for index in front_indices([tried.costs for tried in complete]))


def paired_drop(dense: Sequence[float], plan: Sequence[float]) -> tuple[float, float]:
    """Accuracy drop of ``plan`` against ``dense`` on the same samples, and its standard error.

    The error counts one more lost and one more gained sample than seen, so that it is never zero.
    """
    differences = [d - p for d, p in zip(dense, plan, strict=True)]
    n = len(differences)
    drop = math.fsum(differences) / n
    squares = math.fsum(difference**2 for difference in differences) + 2.0
    return drop, math.sqrt(max(0.0, squares / (n + 2) - drop**2) / (n + 2))


def rung_sizes(rungs: Sequence[int] | None, samples: int) -> tuple[int, ...]:
    """Prefix sizes of the search split, the last one the whole split; by default a quarter, then everything."""
    sizes = rungs if rungs is not None else (math.ceil(samples / 4),)
    return (*(size for size in sizes if size < samples), samples)


class Search:
    """One job's search over plans. ``run`` is deterministic for equal evaluations, whatever their order of arrival."""

    def __init__(
        self,
        space: PlanSpace,
        spec: SearchSpec,
        constraint: ConstraintSpec,
        *,
        ratio: Callable[[SkipPlan], float],
        seeds: Sequence[SkipPlan],
        risk_order: Sequence[int],
        samples: int,
        evaluate: Evaluate,
        on_tried: Callable[[Tried], None] = lambda tried: None,
    ) -> None:
        self._space, self._spec, self._constraint = space, spec, constraint
        self._ratio, self._risk_order, self._evaluate, self._on_tried = ratio, risk_order, evaluate, on_tried
        self._rungs = rung_sizes(spec.rungs, samples)
        self._proposals = Proposals(space, spec.sampler, spec.seed, seeds)
        self._dense: tuple[float, ...] = ()
        self._tried: dict[str, Tried] = {}
        self._failed: dict[str, str] = {}

    def run(self) -> SearchOutcome:
        """Evaluate dense, then batches of proposals until the budget is spent or no plan is left.

        Raises RuntimeError when the dense model itself cannot be evaluated.
        """
        dense = SkipPlan.dense(self._space.num_layers)
        (_, scores), *_ = list(self._evaluate([(dense, self._rungs[-1])]))
        if scores.failure is not None:
            raise RuntimeError(f"the dense model cannot be evaluated: {scores.failure}")
        self._dense = scores.values
        self._record(dense, scores.values)
        stopped = f"the budget of {self._spec.evaluations} evaluations is spent"
        while (asked := len(self._tried) + len(self._failed) - 1) < self._spec.evaluations:
            batch = self._ask(min(self._spec.batch, self._spec.evaluations - asked))
            if not batch:
                stopped = "every possible plan was tried"
                break
            self._climb(batch)
            for plan in batch:
                self._tell(plan)
        return SearchOutcome(
            dense_accuracy=self._tried[dense.text].accuracy,
            samples=self._rungs[-1],
            tried=tuple(self._tried.values()),
            failed=dict(self._failed),
            stopped_because=stopped,
        )

    def _ask(self, count: int) -> list[SkipPlan]:
        parents = [SkipPlan.parse(tried.plan) for tried in self._front()]
        batch: list[SkipPlan] = []
        while len(batch) < count:
            plan = self._proposals.ask(parents, self._risk_order)
            if plan is None:
                break
            batch.append(plan)
        return batch

    def _climb(self, batch: Sequence[SkipPlan]) -> None:
        """Evaluate a batch rung by rung; each rung's survivors are chosen from the same state for all."""
        climbing = list(batch)
        for size in self._rungs:
            results = dict(self._evaluate([(plan, size) for plan in climbing])) if climbing else {}
            for plan in climbing:  # in the order asked, not in the order of arrival
                scores = results[plan]
                if scores.failure is not None:
                    self._failed[plan.text] = scores.failure
                else:
                    self._record(plan, scores.values)
            front = self._front()
            climbing = [
                plan for plan in climbing if plan.text in self._tried and self._promising(self._tried[plan.text], front)
            ]
        for plan in batch:
            if plan.text in self._tried:
                self._on_tried(self._tried[plan.text])

    def _record(self, plan: SkipPlan, scores: Sequence[float]) -> None:
        drop, error = paired_drop(self._dense[: len(scores)], scores)
        self._tried[plan.text] = Tried(
            plan=plan.text,
            n=len(scores),
            accuracy=math.fsum(scores) / len(scores),
            drop=drop,
            drop_error=0.0 if plan.is_dense else error,
            latency_ratio=self._ratio(plan),
            complete=len(scores) == self._rungs[-1],
        )

    def _front(self) -> tuple[Tried, ...]:
        complete = [tried for tried in self._tried.values() if tried.complete]
        return tuple(complete[index] for index in front_indices([tried.costs for tried in complete]))

    def _promising(self, tried: Tried, front: Sequence[Tried]) -> bool:
        """Whether the plan could meet the constraint and be on the front once more samples were seen."""
        limit = self._constraint.max_accuracy_drop
        if limit is not None and tried.optimistic_drop > limit:
            return False
        if self._constraint.min_speedup is not None and tried.latency_ratio * self._constraint.min_speedup > 1.0:
            return False
        return not any(
            other.latency_ratio <= tried.latency_ratio
            and other.drop + OPTIMISM * other.drop_error < tried.optimistic_drop
            for other in front
        )

    def _tell(self, plan: SkipPlan) -> None:
        tried = self._tried.get(plan.text)
        if tried is None:
            self._proposals.tell(plan, None, {})
        else:
            self._proposals.tell(plan, tried.costs, constraint_values(tried, self._constraint))


def constraint_values(tried: Tried, constraint: ConstraintSpec) -> dict[str, float]:
    """One number per constraint of the job, met when at most 0, as the search sees them."""
    values: dict[str, float] = {}
    if constraint.max_accuracy_drop is not None:
        values["max_accuracy_drop"] = tried.drop - constraint.max_accuracy_drop
    if constraint.min_accuracy is not None:
        values["min_accuracy"] = constraint.min_accuracy - tried.accuracy
    if constraint.min_speedup is not None:
        values["min_speedup"] = tried.latency_ratio * constraint.min_speedup - 1.0
    if constraint.max_layers_touched is not None:
        values["max_layers_touched"] = touched(SkipPlan.parse(tried.plan)) - constraint.max_layers_touched
    return values


def choose_finalists(outcome: SearchOutcome, constraint: ConstraintSpec, count: int) -> tuple[str, ...]:
    """At most ``count`` plans to verify: spread over the front from fastest to most careful, then the runners-up.

    The dense plan, plans predicted to be no faster than it, and plans that could meet the constraint only against
    the evidence of the search are left out. Runners-up (the front without the plans chosen already) fill the places
    that a short front leaves, since its few plans may owe their rank to chance.
    """
    limit = math.inf if constraint.max_accuracy_drop is None else constraint.max_accuracy_drop
    slowest = 1.0 if constraint.min_speedup is None else 1.0 / constraint.min_speedup
    eligible = [
        tried
        for tried in outcome.tried
        if tried.complete
        and tried.latency_ratio < 1.0
        and tried.latency_ratio <= slowest
        and tried.optimistic_drop <= limit
    ]
    chosen: list[Tried] = []
    while eligible and len(chosen) < count:
        front = [eligible[index] for index in front_indices([tried.costs for tried in eligible])]
        chosen += _spread(front, count - len(chosen), limit)
        eligible = [tried for tried in eligible if tried not in front]
    return tuple(tried.plan for tried in chosen)


def _spread(front: Sequence[Tried], count: int, limit: float) -> list[Tried]:
    """At most ``count`` members of a front that is ordered by latency, at even steps with both ends."""
    if len(front) <= count:
        return list(front)
    if count == 1:
        return [next((tried for tried in front if tried.drop <= limit), front[0])]
    return [front[round(position * (len(front) - 1) / (count - 1))] for position in range(count)]
