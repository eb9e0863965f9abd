"""The search loop: a strategy asks for candidates, the rungs sort out the hopeless ones, the strategy is told.

Everything is decided from paired differences to the dense model on the same samples. A candidate is never evaluated
twice on the same rung: what a strategy asks for again is answered from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optimizer.search.budget import Budget
from optimizer.search.pareto import front_indices
from optimizer.search.problem import Ask, Problem, Strategy
from optimizer.search.rungs import promising
from optimizer.search.space import Candidate
from optimizer.search.trial import Evaluate, Scores, SearchOutcome, Tried, tried_of
from workers.runtime import SkipPlan

MOST_IDLE_BATCHES = 50
"""A strategy that asks so often in a row for what is known only has nothing to add."""


class Search:
    """One job's search over candidates.

    ``run`` is deterministic for equal evaluations, whatever their order of arrival, unless a time budget ends it.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        budget: Budget,
        *,
        evaluate: Evaluate,
        on_tried: Callable[[Tried], None] = lambda tried: None,
    ) -> None:
        self._problem, self._strategy, self._budget = problem, strategy, budget
        self._evaluate, self._on_tried = evaluate, on_tried
        self._dense: tuple[float, ...] = ()
        self._dense_accuracy = 1.0
        self._tried: dict[Candidate, Tried] = {tried.candidate: tried for tried in problem.known}
        self._on_rung: dict[tuple[Candidate, int], Tried] = {(t.candidate, t.n): t for t in problem.known}
        self._failed: dict[Candidate, str] = {}

    def run(self) -> SearchOutcome:
        """Evaluate dense, then what the strategy asks for until the budget is spent or it asks for nothing more.

        Raises RuntimeError when the dense model itself cannot be evaluated.
        """
        dense = Candidate(SkipPlan.dense(self._problem.space.num_layers))
        (_, scores), *_ = list(self._evaluate([(dense, self._problem.rungs[-1])]))
        if scores.failure is not None:
            raise RuntimeError(f"the dense model cannot be evaluated: {scores.failure}")
        self._dense = scores.values
        self._record(dense, scores)
        self._dense_accuracy = self._tried[dense].accuracy
        self._strategy.start(self._tried[dense])
        stopped = self._batches()
        return SearchOutcome(
            dense_accuracy=self._dense_accuracy,
            samples=self._problem.rungs[-1],
            tried=tuple(self._tried.values()),
            failed={str(candidate): reason for candidate, reason in self._failed.items()},
            stopped_because=stopped,
            layer_executions=self._budget.layer_executions,
        )

    def _batches(self) -> str:
        idle = 0
        while idle < MOST_IDLE_BATCHES:
            reason = self._budget.spent()
            if reason is not None:
                return reason
            asked = self._strategy.ask(min(self._problem.batch, self._budget.left()))
            if not asked:
                return self._strategy.done
            before = len(self._on_rung)
            self._strategy.tell([(each.candidate, self._answer(each)) for each in self._climb(asked)])
            idle = idle + 1 if len(self._on_rung) == before else 0
            reason = self._budget.quiet(self._strategy.expected_gain)
            if reason is not None:
                return reason
        return "the strategy asked for nothing new"

    def _answer(self, ask: Ask) -> Tried | None:
        """What is told about an ask: the rung it named, else the largest one reached; None for a failure."""
        if ask.samples is not None:
            return self._on_rung.get((ask.candidate, ask.samples))
        return None if ask.candidate in self._failed else self._tried[ask.candidate]

    def _climb(self, asked: Sequence[Ask]) -> Sequence[Ask]:
        """Evaluate a batch rung by rung; each rung's survivors are chosen from the same state for all."""
        self._budget.evaluations += sum(
            ask.candidate not in self._tried and ask.candidate not in self._failed for ask in asked
        )
        climbing = list(asked)
        for size in self._problem.rungs:
            here = [ask for ask in climbing if ask.samples is None or ask.samples >= size]
            self._run([ask.candidate for ask in here if not self._knows(ask, size)], size)
            front = self._front()
            climbing = [ask for ask in here if ask.candidate not in self._failed and self._goes_on(ask, size, front)]
        for ask in asked:
            if ask.candidate in self._tried:
                self._on_tried(self._tried[ask.candidate])
        return asked

    def _knows(self, ask: Ask, size: int) -> bool:
        """Whether nothing is to be run on this rung; a strategy that names its rung wants that rung's figures."""
        if (ask.candidate, size) in self._on_rung:
            return True
        return ask.samples != size and ask.candidate in self._tried and self._tried[ask.candidate].n > size

    def _goes_on(self, ask: Ask, size: int, front: Sequence[Tried]) -> bool:
        if ask.samples is not None:
            return ask.samples > size
        tried = self._on_rung.get((ask.candidate, size), self._tried[ask.candidate])
        return promising(tried, front, self._problem.limits, self._dense_accuracy)

    def _run(self, candidates: Sequence[Candidate], size: int) -> None:
        wanted = list(dict.fromkeys(candidate for candidate in candidates if candidate not in self._failed))
        results = dict(self._evaluate([(candidate, size) for candidate in wanted])) if wanted else {}
        for candidate in wanted:  # in the order asked, not in the order of arrival
            scores = results[candidate]
            if scores.failure is not None:
                self._failed[candidate] = scores.failure
            else:
                self._record(candidate, scores)

    def _record(self, candidate: Candidate, scores: Scores) -> None:
        problem = self._problem
        ratio = problem.ratio(candidate.plan)
        tried = tried_of(candidate, scores, self._dense, ratio, problem.rungs[-1])
        seen = self._tried[candidate].n if candidate in self._tried else 0
        self._budget.layer_executions += max(0, tried.n - seen) * len(candidate.plan.kept)
        self._on_rung[candidate, tried.n] = tried
        if tried.n >= seen:
            self._tried[candidate] = tried

    def _front(self) -> tuple[Tried, ...]:
        complete = [tried for tried in self._tried.values() if tried.complete]
        return tuple(complete[index] for index in front_indices([tried.costs for tried in complete]))
