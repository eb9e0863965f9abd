"""Scouting: how far every family of plans can go, before the search proper begins.

A ladder is a family of plans from careful to fast: a criterion's nested sets of one action, a published method's
plans, the additive problem's solutions. Along a ladder harm mostly grows, so a search like halving finds its last good
plan in few evaluations, most of which end on the first rung. All ladders are searched side by side. Where every action
begins to hurt is what the sampler needs to know most, and the front is then about as good as every family's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.search.problem import Answer, Ask, Problem
from optimizer.search.space import Candidate
from optimizer.search.strategies.study import StudyStrategy
from optimizer.search.trial import Tried

CAREFUL = 0.25
"""Where between the last good plan and the first bad one a ladder is tried next. Half would need fewest evaluations;
nearer the careful end more of them are of use themselves. Chosen by the benchmark in docs/benchmarks.md."""


class Ladder:
    """Plans from careful to fast, and between which of them the last good one is."""

    def __init__(self, plans: Sequence[Candidate]) -> None:
        self._plans = plans
        self._good, self._bad = -1, len(plans)

    @property
    def open(self) -> int:
        """How many plans may still be the last good one."""
        return self._bad - self._good - 1

    @property
    def next(self) -> Candidate | None:
        """The plan to ask for; None when nothing is open."""
        return self._plans[self._at] if self.open else None

    @property
    def _at(self) -> int:
        """The place of the plan to ask for."""
        return self._good + max(1, round(CAREFUL * (self._bad - self._good)))

    def tell(self, good: bool) -> None:
        """What came of the plan asked for: whether it may do."""
        if good:
            self._good = self._at
        else:
            self._bad = self._at


class Scouting:
    """Searches ladders first, then hands over to the strategy inside, which learns from every evaluation.

    The problem's seeds come before the ladders' plans, of which at most ``problem.scouts`` are asked for.
    """

    def __init__(self, problem: Problem, inner: StudyStrategy) -> None:
        self._problem, self._inner = problem, inner
        self._ladders = [
            Ladder(sorted(plans, key=lambda candidate: -problem.ratio(candidate.plan))) for plans in problem.ladders
        ]
        self._scouts = problem.scouts
        self._seen: dict[Candidate, Tried | None] = {tried.candidate: tried for tried in problem.known}
        self._waiting: set[Candidate] = set()
        self._seeds = self._new(problem.seeds)
        self._dense_accuracy = 1.0

    @property
    def done(self) -> str:
        """Why there is nothing more to ask for."""
        return self._inner.done

    @property
    def expected_gain(self) -> float | None:
        """What the strategy inside expects; nothing while ladders are searched."""
        return None if self._ladders else self._inner.expected_gain

    def start(self, dense: Tried) -> None:
        """Begin."""
        self._dense_accuracy = dense.accuracy
        self._seen[dense.candidate] = dense
        self._inner.start(dense)

    def begin_with(self, seeds: Sequence[Candidate]) -> None:
        """Put seeds before those that still wait."""
        self._seeds += self._new(seeds)
        self._inner.begin_with(seeds)

    def _new(self, seeds: Sequence[Candidate]) -> int:
        """How many more seeds the strategy inside will ask for; each once, and none that is known."""
        new = {each for each in seeds if each not in self._seen and each not in self._waiting and not each.is_dense}
        self._waiting |= new
        return len(new)

    def ask(self, count: int) -> Sequence[Ask]:
        """Seeds, then the middles of open ladders, then what the strategy inside asks for."""
        asked = list(self._inner.ask(min(count, self._seeds))) if self._seeds else []
        self._seeds = max(0, self._seeds - count)
        waiting = {each.candidate for each in asked}
        middles = [each for each in self._open() if each not in waiting][: min(count - len(asked), self._scouts)]
        if not middles and not asked:
            self._ladders = []
            return self._inner.ask(count)
        self._scouts -= len(middles)
        self._inner.begin_with(middles)
        return [*asked, *self._inner.ask(len(middles))]

    def tell(self, answers: Sequence[Answer]) -> None:
        """Tell the strategy inside, and keep what came out for the ladders."""
        self._inner.tell(answers)
        self._seen.update(answers)

    def _open(self) -> list[Candidate]:
        """What is to be known next of every ladder, each plan once."""
        for ladder in self._ladders:
            while (middle := ladder.next) is not None and middle in self._seen:
                ladder.tell(self._may_do(self._seen[middle]))
        widest_first = sorted(self._ladders, key=lambda ladder: -ladder.open)
        return list(dict.fromkeys(each for ladder in widest_first if (each := ladder.next) is not None))

    def _may_do(self, tried: Tried | None) -> bool:
        """Whether a plan may meet the limit of accuracy; one that failed does not."""
        if tried is None:
            return False
        drop = tried.drop if tried.complete else tried.optimistic_drop
        return drop <= self._problem.limits.largest_drop(self._dense_accuracy)
