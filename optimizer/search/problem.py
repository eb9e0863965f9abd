"""What a strategy is given, what it asks for, and what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from optimizer.criteria import Risk
from optimizer.search.constraints import Limits
from optimizer.search.latency import Ratio
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.trial import Tried
from workers.redundancy.table import LayerTable


@dataclass(frozen=True)
class Problem:
    """One job's search problem, the same for every strategy."""

    space: PlanSpace
    limits: Limits
    ratio: Ratio
    """Predicted latency as a share of dense."""
    rungs: tuple[int, ...]
    """Prefix sizes of the search split, the last one the whole split."""
    risk: Risk
    """Predicted by the job's criterion."""
    table: LayerTable
    """The measurements that published criteria read."""
    seed: int = 0
    batch: int = 8
    seeds: tuple[Candidate, ...] = ()
    """Where to begin, the most informative first."""
    reserve: tuple[Candidate, ...] = ()
    """Further seeds: proposed only when the model of the strategy thinks well of them."""
    ladders: tuple[tuple[Candidate, ...], ...] = ()
    """Families of plans, of each of which the last good one is looked for before the search proper."""
    scouts: int = 0
    """Evaluations that this may take."""
    known: tuple[Tried, ...] = field(default=(), repr=False)
    """What earlier jobs found out about this model on these samples; never evaluated again."""

    @cached_property
    def feasible(self) -> FeasiblePlans:
        """The plans that meet every constraint which needs no evaluation."""
        return FeasiblePlans(self.space, self.limits, self.ratio)

    def foresee(self, candidate: Candidate) -> tuple[float, bool]:
        """Predicted latency as a share of dense, and whether every constraint that needs no evaluation is met."""
        ratio = self.ratio(candidate.plan)
        return ratio, self.limits.possible(candidate.plan, ratio)

    def possible(self, candidate: Candidate) -> bool:
        """Whether a candidate meets every constraint that needs no evaluation."""
        return self.foresee(candidate)[1]


@dataclass(frozen=True)
class Ask:
    """A candidate to evaluate: on growing rungs while it is promising, or on exactly ``samples`` of them."""

    candidate: Candidate
    samples: int | None = None
    """One of the problem's rungs."""


Answer = tuple[Candidate, Tried | None]
"""A candidate and what was seen of it; None where its evaluation failed."""


class Strategy(Protocol):
    """Decides what to evaluate next. Deterministic: equal answers in equal order give equal questions."""

    @property
    def done(self) -> str:
        """Why there is nothing more to ask for."""
        ...

    @property
    def expected_gain(self) -> float | None:
        """Share by which the last batch was expected to raise the front's hypervolume; None where not predicted."""
        ...

    def start(self, dense: Tried) -> None:
        """Begin; ``dense`` is the dense model's own figures."""
        ...

    def ask(self, count: int) -> Sequence[Ask]:
        """What to evaluate next, at most ``count`` new candidates; empty ends the search."""
        ...

    def tell(self, answers: Sequence[Answer]) -> None:
        """The answers to the last question, in the order asked."""
        ...


class PlanList:
    """A strategy that has its plans from the start and evaluates in order those that the problem allows."""

    expected_gain: float | None = None

    def __init__(self, plans: Sequence[Candidate], problem: Problem, name: str) -> None:
        allowed = (plan for plan in dict.fromkeys(plans) if plan in problem.space and problem.possible(plan))
        self.plans = tuple(plan for plan in allowed if not plan.is_dense)
        self._queue = list(self.plans)
        self.done = f"all {len(self.plans)} plans of {name} were tried"

    def start(self, dense: Tried) -> None:
        """Nothing to prepare."""

    def ask(self, count: int) -> Sequence[Ask]:
        """The next plans of the list."""
        batch, self._queue = self._queue[:count], self._queue[count:]
        return [Ask(candidate) for candidate in batch]

    def tell(self, answers: Sequence[Answer]) -> None:
        """What came out changes nothing."""


def better_first(tried: Tried) -> tuple[float, float]:
    """Sort key for candidates of equal cost: KL to dense where it is known (a finer measure), then the drop."""
    return (tried.drop if tried.kl is None else tried.kl, tried.drop)
