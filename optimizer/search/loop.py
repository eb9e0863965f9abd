"""Ask/tell loop with successive rungs: candidates that fail an early rung are dropped.

Everything is decided from paired differences to the dense model on the same samples. A candidate is never evaluated
twice on the same rung: what a strategy asks for again is answered from memory. Large batches go in halves, of which
the next is asked for while the last is under way, so that workers have the one to do where the other ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from optimizer.search.budget import Budget
from optimizer.search.problem import Ask, Problem, Strategy, parts_under_way
from optimizer.search.space import Candidate
from optimizer.search.trial import Evaluate, Scores, SearchOutcome, Trial, front_of
from workers.runtime import SkipPlan

MOST_IDLE_BATCHES = 50
"""Batches in a row that hold nothing new, after which a strategy is taken to have nothing to add."""

Begin = Callable[[Callable[[], None]], Callable[[], None]]
"""Begins the evaluation of a batch, and returns what waits for its end."""


def at_once(work: Callable[[], None]) -> Callable[[], None]:
    """Do work where it begins; nothing is left to wait for."""
    work()
    return lambda: None


@dataclass
class _Batch:
    """A batch under way. What it finds is entered when it ends, so that no other batch depends on how far it came."""

    asked: Sequence[Ask]
    front: tuple[Trial, ...]
    """By which its plans are given up; the one when it was asked."""
    expected_gain: float | None
    trials: dict[tuple[Candidate, int], Trial] = field(default_factory=dict)
    """By candidate and rung, as evaluated."""
    failed: dict[Candidate, str] = field(default_factory=dict)


class Search:
    """Run one job's search over candidates.

    ``run`` is deterministic for equal evaluations, whatever their order of arrival, unless a time budget ends it.
    ``begin`` begins the evaluation of a batch, which may go on while the next is asked for and evaluated.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        budget: Budget,
        *,
        evaluate: Evaluate,
        on_trial: Callable[[Trial], None] = lambda trial: None,
        begin: Begin = at_once,
    ) -> None:
        self._problem, self._strategy, self._budget = problem, strategy, budget
        self._evaluate, self._on_trial, self._begin = evaluate, on_trial, begin
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
        self._enter(self._problem.trial(dense, scores, scores))
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
        """Ask for batches and end them in the order asked; one may be under way while the next is asked."""
        under_way: deque[tuple[_Batch, Callable[[], None]]] = deque()
        idle, reason, most = 0, None, parts_under_way(self._problem, self._strategy)
        while True:
            if reason is None and len(under_way) < most:
                reason = self._budget.spent()
                asked = () if reason else self._strategy.ask(min(self._problem.batch // most, self._budget.left()))
                if asked:
                    batch = self._begun(asked)
                    under_way.append((batch, self._begin(partial(self._climb, batch))))
                    continue
            if not under_way:
                return reason or self._strategy.done
            batch, wait = under_way.popleft()
            wait()
            self._end(batch)
            idle = 0 if batch.trials else idle + 1
            reason = reason or self._budget.quiet(batch.expected_gain)
            if idle == MOST_IDLE_BATCHES:
                reason = reason or "the strategy asked for nothing new"

    def _begun(self, asked: Sequence[Ask]) -> _Batch:
        self._budget.trials += sum(
            ask.candidate not in self._trials and ask.candidate not in self._failed for ask in asked
        )
        return _Batch(asked, front_of(self._trials.values()), self._strategy.expected_gain)

    def _climb(self, batch: _Batch) -> None:
        """Evaluate a batch rung by rung."""
        climbing = list(batch.asked)
        for n_samples in self._problem.rungs:
            here = [ask for ask in climbing if ask.n_samples is None or ask.n_samples >= n_samples]
            self._run(batch, [ask.candidate for ask in here if not self._knows(ask, n_samples)], n_samples)
            climbing = [ask for ask in here if self._goes_on(batch, ask, n_samples)]

    def _knows(self, ask: Ask, n_samples: int) -> bool:
        """Whether nothing is to be run on this rung; a strategy that names its rung wants that rung's figures."""
        if (ask.candidate, n_samples) in self._on_rung:
            return True
        known = self._trials.get(ask.candidate)
        return ask.n_samples != n_samples and known is not None and known.n_samples > n_samples

    def _goes_on(self, batch: _Batch, ask: Ask, n_samples: int) -> bool:
        if ask.candidate in self._failed or ask.candidate in batch.failed:
            return False
        if ask.n_samples is not None:
            return ask.n_samples > n_samples
        at = ask.candidate, n_samples
        trial = batch.trials.get(at) or self._on_rung.get(at) or self._trials[ask.candidate]
        return self._problem.limits.promising(trial, batch.front, self._dense_accuracy)

    def _run(self, batch: _Batch, candidates: Sequence[Candidate], n_samples: int) -> None:
        wanted = list(dict.fromkeys(candidate for candidate in candidates if candidate not in self._failed))
        results = dict(self._evaluate([(candidate, n_samples) for candidate in wanted])) if wanted else {}
        for candidate in wanted:  # in the order asked, not in the order of arrival
            scores = results[candidate]
            if scores.failure is not None:
                batch.failed[candidate] = scores.failure
            else:
                trial = self._problem.trial(candidate, scores, self._dense)
                batch.trials[candidate, trial.n_samples] = trial

    def _end(self, batch: _Batch) -> None:
        """Enter what a batch found, and tell it to the strategy."""
        for trial in batch.trials.values():
            self._enter(trial)
        self._failed |= batch.failed
        for ask in batch.asked:
            if ask.candidate in self._trials:
                self._on_trial(self._trials[ask.candidate])
        self._strategy.tell([(each.candidate, self._answer(each)) for each in batch.asked])

    def _answer(self, ask: Ask) -> Trial | None:
        """Return the trial on the rung that was named, else on the largest one reached; None for a failure."""
        if ask.n_samples is not None:
            return self._on_rung.get((ask.candidate, ask.n_samples))
        return None if ask.candidate in self._failed else self._trials[ask.candidate]

    def _enter(self, trial: Trial) -> None:
        candidate = trial.candidate
        seen = self._trials[candidate].n_samples if candidate in self._trials else 0
        self._budget.layer_executions += max(0, trial.n_samples - seen) * candidate.plan.executions
        self._on_rung[candidate, trial.n_samples] = trial
        if trial.n_samples >= seen:
            self._trials[candidate] = trial
