"""Bisection: find the last good plan of every chain of nested plans, before the search proper begins.

A chain goes from careful to fast: a criterion's nested sets of one action, a published method's plans, the additive
problem's solutions. Along it harm mostly grows, so a binary search finds its last good plan in few evaluations, most of
which end on the first rung. All chains are searched side by side. Where every action begins to hurt is what the
sampler needs to know most, and the front is then about as good as every chain's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.search.problem import Answer, Ask, Problem
from optimizer.search.space import Candidate
from optimizer.search.strategies.study import StudyStrategy
from optimizer.search.trial import Trial

CAREFUL = 0.25
"""Where between the last good plan and the first bad one a chain is tried next. Half would need fewest evaluations;
nearer the careful end more of them are of use themselves. Chosen by the benchmark in docs/benchmarks.md."""


class Chain:
    """Binary search over plans from careful to fast: the last good one is between two bounds."""

    def __init__(self, plans: Sequence[Candidate]) -> None:
        self._plans = plans
        self._good, self._bad = -1, len(plans)
        self.least_time = 1.0
        """Of the good plans as drafters."""

    @property
    def open(self) -> int:
        """Number of plans that may still be the last good one."""
        return self._bad - self._good - 1

    @property
    def next(self) -> Candidate | None:
        """The plan to evaluate next; None when nothing is open."""
        return self._plans[self._at] if self.open else None

    @property
    def _at(self) -> int:
        return self._good + max(1, round(CAREFUL * (self._bad - self._good)))

    def narrow(self, good: bool) -> None:
        """Move a bound to the next plan, which turned out good (it may meet the limit) or bad."""
        if good:
            self._good = self._at
        else:
            self._bad = self._at


class Bisection:
    """Bisect the problem's chains, then hand over to the strategy inside, which learns from every evaluation.

    The problem's seeds come before the chains' plans, of which at most ``problem.bisections`` are asked for. Where
    batches go in halves, so do the chains.
    """

    asks_ahead = True

    def __init__(self, problem: Problem, inner: StudyStrategy) -> None:
        self._problem, self._inner = problem, inner
        self._chains = [
            Chain(sorted(plans, key=lambda candidate: -problem.ratio(candidate.plan))) for plans in problem.chains
        ]
        self._left = problem.bisections
        self._seen: dict[Candidate, Trial | None] = {trial.candidate: trial for trial in problem.known}
        # Seeds that the strategy inside will ask for: each once, and none that is known.
        self._seeds = len({each for each in problem.seeds if each not in self._seen and not each.is_dense})
        self._dense_accuracy = 1.0
        self._waiting: set[Candidate] = set()
        """Asked for, and not told yet."""

    @property
    def done(self) -> str:
        return self._inner.done

    @property
    def expected_gain(self) -> float | None:
        """The expectation of the strategy inside; None during bisection."""
        return None if self._chains else self._inner.expected_gain

    def start(self, dense: Trial) -> None:
        self._dense_accuracy = dense.accuracy
        self._seen[dense.candidate] = dense
        self._inner.start(dense)

    def ask(self, count: int) -> Sequence[Ask]:
        """Return seeds, then the middles of open chains, then what the strategy inside asks for.

        It is asked too while every open chain waits for its middle.
        """
        asked = list(self._inner.ask(min(count, self._seeds))) if self._seeds else []
        self._seeds = max(0, self._seeds - count)
        waiting = self._waiting | {each.candidate for each in asked}
        middles = self._open()
        if not asked and not (middles and self._left):
            self._chains = []
        share = -(-len(middles) // self._problem.batch_parts)
        free = [each for each in middles if each not in waiting]
        middles = free[: min(count - len(asked), self._left, share)]
        self._left -= len(middles)
        self._inner.begin_with(middles)
        asked += self._inner.ask(len(middles) if middles or asked else count)
        self._waiting.update(each.candidate for each in asked)
        return asked

    def tell(self, answers: Sequence[Answer]) -> None:
        self._inner.tell(answers)
        self._seen.update(answers)
        self._waiting.difference_update(candidate for candidate, _ in answers)

    def _open(self) -> list[Candidate]:
        """Return the next plan of every chain, each plan once."""
        for chain in self._chains:
            while (middle := chain.next) is not None and middle in self._seen:
                chain.narrow(self._is_good(chain, self._seen[middle]))
        widest_first = sorted(self._chains, key=lambda chain: -chain.open)
        return list(dict.fromkeys(each for chain in widest_first if (each := chain.next) is not None))

    def _is_good(self, chain: Chain, trial: Trial | None) -> bool:
        """Whether a plan may meet the limit on accuracy; of drafters, whether it saves time beside those before it.

        Along a chain drafts get cheaper and fewer of them right, so that the time falls and then rises.
        """
        if trial is None:  # its evaluation failed
            return False
        if trial.drafter is not None:
            good = trial.drafter.optimistic_time < chain.least_time
            chain.least_time = min(chain.least_time, trial.drafter.time)
            return good
        return self._problem.limits.keeps(trial, self._dense_accuracy, optimistic=not trial.complete)
