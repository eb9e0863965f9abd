"""Plans to scores: what is known is read from the database, the rest is asked of the workers and persisted at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optimizer.inputs import split_hash
from optimizer.search import Scores
from optimizer.stages.context import JobContext
from storage import evaluations, stages
from workers.messages import EvaluatePlan, Evaluation, Failure
from workers.runtime import SkipPlan


class Evaluator:
    """Scores plans on prefixes of one split; no plan is run twice on the same samples, not even by another job."""

    def __init__(self, context: JobContext, split: str) -> None:
        self._context, self._split = context, split
        self._samples = len(context.task.split(split))
        self._hash = split_hash(context.task, split)
        self._own = {(each.plan, each.rung): each for each in evaluations.for_job(context.db, context.job.id, split)}
        self._known = {
            (each.plan, each.n): each.id
            for each in evaluations.known(
                context.db,
                model_id=context.model_id,
                task_id=context.task_id,
                split_hash=self._hash,
                settings=context.settings,
            )
            if each.compensation == evaluations.NO_COMPENSATION
        }
        self.secondary: dict[str, dict[str, float]] = {}
        """Secondary metrics of the plans scored so far, by plan, on the largest prefix."""

    def __call__(self, requests: Sequence[tuple[SkipPlan, int]]) -> Iterator[tuple[SkipPlan, Scores]]:
        """Yield each plan with its scores on so many samples, in any order; each is persisted before it is yielded."""
        missing: list[tuple[SkipPlan, int]] = []
        for plan, size in requests:
            stored = self._recall(plan.text, size)
            if stored is None:
                missing.append((plan, size))
            else:
                yield plan, self._scores(stored)
        messages = [self._message(plan, size) for plan, size in missing]
        for index, result in self._context.pool.run(messages):
            plan, size = missing[index]
            yield plan, self._scores(self._store(plan.text, size, result))

    def _message(self, plan: SkipPlan, size: int) -> EvaluatePlan:
        return EvaluatePlan(plan.text, self._split, None if size == self._samples else size)

    def _recall(self, plan: str, size: int) -> evaluations.Evaluation | None:
        """The evaluation if this or another job has it. The prefix size serves as the number of the rung."""
        own = self._own.get((plan, size))
        if own is not None:
            return own
        known = self._known.get((plan, size))
        if known is None:
            return None
        self._own[plan, size] = evaluations.reuse(self._context.db, self._context.job, known, size)
        return self._own[plan, size]

    def _store(self, plan: str, size: int, result: object) -> evaluations.Evaluation:
        context = self._context
        if isinstance(result, Failure):
            return evaluations.record_failure(
                context.db,
                context.job,
                model_id=context.model_id,
                task_id=context.task_id,
                plan=plan,
                split=self._split,
                split_hash=self._hash,
                rung=size,
                reason=result.reason,
                settings=context.settings,
            )
        assert isinstance(result, Evaluation)
        stored = evaluations.record(
            context.db,
            context.job,
            model_id=context.model_id,
            task_id=context.task_id,
            plan=plan,
            split=self._split,
            split_hash=self._hash,
            rung=size,
            sample_scores=result.scores,
            seconds=result.seconds,
            secondary=result.secondary,
            settings=context.settings,
        )
        increments = {"evaluations": 1.0, "samples": float(result.n), "evaluation_seconds": result.seconds}
        if result.failed_samples:
            increments["failed_samples"] = float(len(result.failed_samples))
            sample, reason = next(iter(result.failed_samples.items()))
            context.progress.note(
                f"plan {plan}: {len(result.failed_samples)} samples failed and count as wrong, first {sample}: {reason}"
            )
        stages.add_counters(context.db, context.job, increments)
        return stored

    def _scores(self, stored: evaluations.Evaluation) -> Scores:
        if stored.failure is None:
            self.secondary[stored.plan] = dict(stored.secondary)
        return Scores(stored.scores, stored.failure)
