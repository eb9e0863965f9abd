"""Score candidates on everything that a job's plans are judged by, a task at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from optimizer.search.space import Candidate
from optimizer.search.trial import Scores
from optimizer.stages.cached_evaluation import EVERY_SAMPLE_FAILED, CachedEvaluation
from optimizer.stages.context import JobContext
from storage.queue import stages
from workers.messages import Artifact


class GoalEvaluation:
    """Score candidates on prefixes of one split: on that of the job's one task, or on those of all its goals.

    With several goals a prefix holds all of them in proportion (:meth:`~optimizer.search.goals.Goals.prefixes`), and
    a candidate that fails on one fails. ``seconds_counter`` names the job's counter of the seconds spent, if they are
    counted. So many calls as ``at_once`` share the workers.
    """

    def __init__(
        self,
        context: JobContext,
        split: str,
        maps: Mapping[Candidate, Artifact] | None = None,
        *,
        seconds_counter: str | None = None,
        at_once: int = 1,
    ) -> None:
        self._context, self._split, self._goals = context, split, context.goals
        if self._goals is None:
            self._by_goal = {"": CachedEvaluation(context, split, maps, at_once=at_once)}
        else:
            tasks = {name: each.task for name, each in context.judged.items()}
            alone = len(context.task.parts) == 0
            self._by_goal = {
                name: CachedEvaluation(
                    context, split, maps, task=None if alone and task is context.task else task, at_once=at_once
                )
                for name, task in tasks.items()
            }
        self._seconds_counter = seconds_counter
        self._before = stages.counters(context.db, context.job.id).get(seconds_counter or "", 0.0)
        self._spent = 0.0
        self._last: float | None = None

    def __call__(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        """Yield each candidate with its scores on so many samples, in any order; scores are stored before."""
        started = time.monotonic()
        if self._goals is None:
            yield from self._by_goal[""](requests)
        else:
            yield from self._on_all(requests)
        self._count_seconds(started)

    def secondary(self, candidate: Candidate) -> dict[str, dict[str, float]]:
        """Return the secondary metrics of a candidate by goal, on the largest prefix scored so far."""
        found = {name: each.secondary.get(candidate) for name, each in self._by_goal.items()}
        return {name: metrics for name, metrics in found.items() if metrics}

    def elapsed(self) -> float:
        """Return the seconds spent over all attempts; 0 while a resumed job only reads what it evaluated before."""
        return 0.0 if self._last is None else self._before + self._spent

    def _on_all(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        assert self._goals is not None
        sizes = {n: self._sizes(n) for n in dict.fromkeys(n for _, n in requests)}
        found: dict[Candidate, dict[str, Scores]] = {candidate: {} for candidate, _ in requests}
        failed: dict[Candidate, str] = {}
        for name, evaluate in self._by_goal.items():
            asked = {each: sizes[n][name] for each, n in requests if each not in failed and sizes[n][name]}
            for candidate, scores in evaluate(list(asked.items())):
                size = asked[candidate]
                if scores.failure == EVERY_SAMPLE_FAILED and size < self._context.judged[name].size(self._split):
                    scores = Scores((math.nan,) * size)  # the samples are few, and more are to come
                if scores.failure is not None:
                    failed[candidate] = f"{name}: {scores.failure}"
                found[candidate][name] = scores
        for candidate, _ in requests:
            if candidate in failed:
                yield candidate, Scores((), failed[candidate])
            else:
                yield candidate, Scores((), by_goal=found[candidate])

    def _sizes(self, n_samples: int) -> dict[str, int]:
        """Return how many samples of each goal a prefix holds; held-out, all that count are asked together."""
        assert self._goals is not None
        if self._split == "search":
            return self._goals.prefixes(n_samples)
        return {name: each.size(self._split) for name, each in self._context.judged.items()}

    def _count_seconds(self, started: float) -> None:
        """Count the time since the last request that ran anything, the time of proposing included."""
        if self._seconds_counter is None or not any(each.ran for each in self._by_goal.values()):
            return
        now = time.monotonic()
        seconds = now - (started if self._last is None else self._last)
        self._spent, self._last = self._spent + seconds, now
        stages.add_counters(self._context.db, self._context.job, {self._seconds_counter: seconds})
