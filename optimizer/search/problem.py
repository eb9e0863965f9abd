"""A search problem, and the protocol of the strategies that solve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from optimizer.criteria import Risk
from optimizer.search.constraints import Limits
from optimizer.search.drafting import DraftJudge
from optimizer.search.goals import Goals
from optimizer.search.latency import Ratio
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.trial import Scores, Trial, trial_of
from workers.redundancy.table import LayerTable

HALVED = 32
"""Plans of a batch from which on it goes in halves: the work of one half is then enough for as many workers."""


@dataclass(frozen=True)
class Problem:
    """One job's search problem, the same for every strategy."""

    space: PlanSpace
    limits: Limits
    ratio: Ratio
    """Predicted latency as a share of dense; in a lossless job that of a decoding step."""
    rungs: tuple[int, ...]
    """Prefix sizes of the search split, the last one the whole split."""
    risk: Risk
    """Predicted by the job's criterion, as far as it is to be trusted."""
    table: LayerTable
    """The measurements that published criteria read."""
    trust: float = 1.0
    """How much of the criterion's order counts; below 1 fewer of its plans are tried."""
    seed: int = 0
    batch: int = 8
    seeds: tuple[Candidate, ...] = ()
    """Candidates to begin with, the most informative first."""
    reserve: tuple[Candidate, ...] = ()
    """Further seeds, proposed only when the strategy's model predicts a gain."""
    chains: tuple[tuple[Candidate, ...], ...] = ()
    """Nested plans, each chain from careful to fast; the last good plan of each is searched by bisection."""
    bisections: int = 0
    """Most trials of bisection."""
    known: tuple[Trial, ...] = field(default=(), repr=False)
    """Trials of earlier jobs on the same model and samples; never evaluated again."""
    drafting: DraftJudge | None = None
    """What judges candidates as drafters; None unless the job is lossless."""
    goals: Goals | None = None
    """What candidates are judged by; None where that is the job's one task."""

    @property
    def batch_parts(self) -> int:
        """Parts that a batch goes in where the strategy asks ahead, evaluated at the same time."""
        return 2 if self.batch >= HALVED else 1

    @cached_property
    def feasible(self) -> FeasiblePlans:
        """The plans that meet every constraint which needs no evaluation."""
        return FeasiblePlans(self.space, self.limits, self.ratio)

    def foresee(self, candidate: Candidate) -> tuple[float, bool]:
        """Return a trial's first cost, and whether every constraint that needs no evaluation is met.

        It is the predicted latency as a share of dense, in a lossless job the extra memory.
        """
        ratio = self.ratio(candidate.plan)
        feasible = self.limits.feasible(candidate.plan, ratio)
        return ratio if self.drafting is None else self.drafting.memory.share(candidate), feasible

    def trial(self, candidate: Candidate, scores: Scores, dense: Scores) -> Trial:
        """Compute a candidate's figures from its scores and those of the dense model on the same samples."""
        judge = self.drafting or self.goals
        of = trial_of if judge is None else judge.trial_of
        return of(candidate, scores, dense, self.ratio(candidate.plan), self.rungs[-1])


@dataclass(frozen=True)
class Ask:
    """A candidate to evaluate: on growing rungs while it is promising, or on exactly ``n_samples`` samples."""

    candidate: Candidate
    n_samples: int | None = None
    """One of the problem's rungs."""


Answer = tuple[Candidate, Trial | None]
"""A candidate and its trial; None where its evaluation failed."""


class Strategy(Protocol):
    """Decide what to evaluate next.

    A strategy is registered by name as a function from a :class:`Problem` to a strategy (``optimizer.registries``,
    or the entry point group ``skipplan.strategies``); that function raises UsageFault or MeasurementError when the
    problem lacks an action or a measurement it needs. ``optimizer.testing.check_strategy`` checks what follows.

    Life cycle. The loop calls ``start`` once, with the dense model's trial. Then it calls ``ask`` and ``tell`` in
    turn: every ``ask`` that returns something is followed by one ``tell``, which answers each :class:`Ask` in the
    order asked. The search ends when the budget is spent or ``ask`` returns nothing; ``done`` is read then.

    A strategy with an attribute ``asks_ahead`` that is true may be asked once more before the ``tell`` of the last
    ``ask``, for other candidates; where it returns nothing then, it is asked again after that.

    A strategy may ask for any candidate of the problem's space. It should not ask for one that is not in
    ``Problem.feasible``, since such a candidate ends on the first rung. Candidates asked for again cost no
    evaluation, and are answered from memory; a strategy that asks for nothing new for many batches in a row is stopped.

    A strategy is deterministic: for an equal problem (its ``seed`` included), equal answers in equal order give equal
    questions. An interrupted search is resumed by asking again, so randomness must come from ``Problem.seed`` alone.
    """

    @property
    def done(self) -> str:
        """Why there is nothing more to ask for; shown to the user as the reason why the search stopped."""
        ...

    @property
    def expected_gain(self) -> float | None:
        """Share by which the last batch was expected to raise the front's hypervolume; None where not predicted."""
        ...

    def start(self, dense: Trial) -> None:
        """Take in the dense model's own trial, before the first ``ask``."""
        ...

    def ask(self, count: int) -> Sequence[Ask]:
        """Return what to evaluate next, at most ``count`` new candidates; nothing ends the search."""
        ...

    def tell(self, answers: Sequence[Answer]) -> None:
        """Take in the answers to the oldest ``ask`` without, in the order asked."""
        ...


def parts_under_way(problem: Problem, strategy: Strategy) -> int:
    """Return in how many parts a strategy's batches go."""
    return problem.batch_parts if getattr(strategy, "asks_ahead", False) else 1


class PlanList:
    """A strategy that has its plans from the start and evaluates in order those that the problem allows."""

    asks_ahead = True
    expected_gain: float | None = None

    def __init__(self, plans: Sequence[Candidate], problem: Problem, name: str) -> None:
        allowed = (plan for plan in dict.fromkeys(plans) if plan in problem.space and plan in problem.feasible)
        self.plans = tuple(plan for plan in allowed if not plan.is_dense)
        self._queue = list(self.plans)
        self.done = f"all {len(self.plans)} plans of {name} were tried"

    def start(self, dense: Trial) -> None: ...

    def ask(self, count: int) -> Sequence[Ask]:
        batch, self._queue = self._queue[:count], self._queue[count:]
        return [Ask(candidate) for candidate in batch]

    def tell(self, answers: Sequence[Answer]) -> None: ...


def better_first(trial: Trial) -> tuple[float, float]:
    """Sort key for candidates of equal cost: KL to dense where it is known (a finer measure), then the loss.

    Of drafters it is the loss of acceptance, which counts positions.
    """
    if trial.drafter is not None:
        return (-trial.difference, trial.kl or 0.0)
    return (-trial.difference if trial.kl is None else trial.kl, -trial.difference)
