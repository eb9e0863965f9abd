"""Ask/tell loop with successive rungs: candidates that fail an early rung are dropped.

Everything is decided from paired differences to the dense model on the same samples. A candidate is never evaluated
twice on the same rung: what a strategy asks for again is answered from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optimizer.search.budget import Budget
from optimizer.search.problem import Ask, Problem, Strategy
from optimizer.search.space import Candidate
from optimizer.search.trial import Evaluate, Scores, SearchOutcome, Trial, front_of
from workers.runtime import SkipPlan

MOST_IDLE_BATCHES = 50
"""Batches in a row that hold nothing new, after which a strategy is taken to have nothing to add."""


class Search:
    """Run one job's search over candidates.

    ``run`` is deterministic for equal evaluations, whatever their order of arrival, unless a time budget ends it.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        budget: Budget,
        *,
        evaluate: Evaluate,
        on_trial: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self._problem, self._strategy, self._budget = problem, strategy, budget
        self._evaluate, self._on_trial = evaluate, on_trial
        self._dense = Scores(())
        self._dense_accuracy = 1.0
        self._trials: dict[Candidate, Trial] = {trial.candidate: trial for trial in problem.known}
        self._on_rung = {(trial.candidate, trial.n_samples): trial for trial in problem.known}
        self._failed: dict[Candidate, str] = {}

    def run(self) -> SearchOutcome:
        """Evaluate dense, then what the strategy asks for until the budget is spent or it asks for nothing more.

        Raises RuntimeError when the dense model itself cannot be evaluated.
        """
        dense = Candidate(SkipPlan.dense(self._problem.space.num_layers))
        (_, scores), *_ = list(self._evaluate([(dense, self._problem.rungs[-1])]))
        if scores.failure is not None:
            raise RuntimeError(f"the dense model cannot be evaluated: {scores.failure}")
        self._dense = scores
        self._record(dense, scores)
        self._dense_accuracy = self._trials[dense].accuracy
        self._strategy.start(self._trials[dense])
        stopped = self._batches()
        return SearchOutcome(
            dense_accuracy=self._dense_accuracy,
            n_samples=self._problem.rungs[-1],
            trials=tuple(self._trials.values()),
            failed={str(candidate): reason for candidate, reason in self._failed.items()},
            stopped_because=stopped,
            layer_executions=round(self._budget.layer_executions),
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
            self._climb(asked)
            self._strategy.tell([(each.candidate, self._answer(each)) for each in asked])
            idle = idle + 1 if len(self._on_rung) == before else 0
            reason = self._budget.quiet(self._strategy.expected_gain)
            if reason is not None:
                return reason
        return "the strategy asked for nothing new"

    def _answer(self, ask: Ask) -> Trial | None:
        """Return the trial on the rung that was named, else on the largest one reached; None for a failure."""
        if ask.n_samples is not None:
            return self._on_rung.get((ask.candidate, ask.n_samples))
        return None if ask.candidate in self._failed else self._trials[ask.candidate]

    def _climb(self, asked: Sequence[Ask]) -> None:
        """Evaluate a batch rung by rung; each rung's survivors are chosen from the same state for all."""
        self._budget.trials += sum(
            ask.candidate not in self._trials and ask.candidate not in self._failed for ask in asked
        )
        climbing = list(asked)
        for n_samples in self._problem.rungs:
            here = [ask for ask in climbing if ask.n_samples is None or ask.n_samples >= n_samples]
            self._run([ask.candidate for ask in here if not self._knows(ask, n_samples)], n_samples)
            front = front_of(self._trials.values())
            climbing = [
                ask for ask in here if ask.candidate not in self._failed and self._goes_on(ask, n_samples, front)
            ]
        for ask in asked:
            if ask.candidate in self._trials:
                self._on_trial(self._trials[ask.candidate])

    def _knows(self, ask: Ask, n_samples: int) -> bool:
        """Whether nothing is to be run on this rung; a strategy that names its rung wants that rung's figures."""
        if (ask.candidate, n_samples) in self._on_rung:
            return True
        known = self._trials.get(ask.candidate)
        return ask.n_samples != n_samples and known is not None and known.n_samples > n_samples

    def _goes_on(self, ask: Ask, n_samples: int, front: Sequence[Trial]) -> bool:
        if ask.n_samples is not None:
            return ask.n_samples > n_samples
        trial = self._on_rung.get((ask.candidate, n_samples), self._trials[ask.candidate])
        return self._problem.limits.promising(trial, front, self._dense_accuracy)

    def _run(self, candidates: Sequence[Candidate], n_samples: int) -> None:
        wanted = list(dict.fromkeys(candidate for candidate in candidates if candidate not in self._failed))
        results = dict(self._evaluate([(candidate, n_samples) for candidate in wanted])) if wanted else {}
        for candidate in wanted:  # in the order asked, not in the order of arrival
            scores = results[candidate]
            if scores.failure is not None:
                self._failed[candidate] = scores.failure
            else:
                self._record(candidate, scores)

    def _record(self, candidate: Candidate, scores: Scores) -> None:
        trial = self._problem.trial(candidate, scores, self._dense)
        seen = self._trials[candidate].n_samples if candidate in self._trials else 0
        self._budget.layer_executions += max(0, trial.n_samples - seen) * candidate.plan.executions
        self._on_rung[candidate, trial.n_samples] = trial
        if trial.n_samples >= seen:
            self._trials[candidate] = trial
