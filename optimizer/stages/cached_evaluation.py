"""Plans to scores: what is known is read from the database, the rest is asked of the workers and persisted at once.

Plans asked for together go to the workers in groups, neighbours by their text, because a worker shares work between
plans that begin alike. A plan that was scored on a shorter prefix of the split before is only run on the samples that
the longer one adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import fsum

from optimizer.job.inputs import split_hash
from optimizer.search.trial import Scores
from optimizer.stages.context import JobContext
from storage.queue import stages
from storage.records import evaluations
from workers.messages import (
    NO_COMPENSATION,
    Artifact,
    EvaluatePlans,
    Evaluation,
    EvaluationFailure,
    Evaluations,
    Failure,
)
from workers.runtime import SkipPlan

LARGEST_GROUP = 64
"""Most plans of one request: what a killed job loses, and what one reply holds, stays bounded."""


@dataclass(frozen=True)
class _Missing:
    """A plan to be run on the samples from ``start`` on, up to the prefix ``size``."""

    plan: SkipPlan
    start: int
    size: int


class Evaluator:
    """Scores plans on prefixes of one split under one compensation.

    No plan is run twice on the same samples, not even by another job.
    """

    def __init__(
        self,
        context: JobContext,
        split: str,
        compensation: str = NO_COMPENSATION,
        artifacts: Mapping[str, Artifact] | None = None,
    ) -> None:
        self._context, self._split, self._compensation = context, split, compensation
        self._artifacts = artifacts or {}
        self._samples = len(context.task.split(split))
        self._hash = split_hash(context.task, split)
        self._own = {
            (each.plan, each.rung): each
            for each in evaluations.for_job(context.db, context.job.id, split)
            if self._is_own(each)
        }
        self._known = {
            (each.plan, each.n): each.id
            for each in evaluations.known(
                context.db,
                model_id=context.model_id,
                task_id=context.task_id,
                split_hash=self._hash,
                settings=context.settings,
            )
            if self._is_own(each)
        }
        self._noted: set[str] = set()
        self.secondary: dict[str, dict[str, float]] = {}
        """Secondary metrics of the plans scored so far, by plan, on the largest prefix."""
        self.ran = 0
        """Plans that workers were asked for; the others were known."""

    def __call__(self, requests: Sequence[tuple[SkipPlan, int]]) -> Iterator[tuple[SkipPlan, Scores]]:
        """Yield each plan with its scores on so many samples, in any order; each is persisted before it is yielded."""
        missing: list[_Missing] = []
        for plan, size in requests:
            stored = self._recall(plan.text, size)
            if stored is None:
                missing.append(_Missing(plan, self._longest_prefix(plan.text, size), size))
            else:
                yield plan, self._scores(stored)
        self.ran += len(missing)
        yield from self._run(self._groups(missing))

    def _run(self, groups: Sequence[Sequence[_Missing]]) -> Iterator[tuple[SkipPlan, Scores]]:
        again: list[_Missing] = []
        for index, result in self._context.pool.run([self._message(group) for group in groups]):
            group = groups[index]
            if isinstance(result, Failure) and len(group) > 1:
                again += group  # one of them may have killed the worker: ask for each alone
                continue
            for each, scored in zip(group, self._each(result, len(group)), strict=True):
                yield each.plan, self._scores(self._store(each, scored))
        if again:
            yield from self._run([[each] for each in again])

    def _each(self, result: object, count: int) -> Sequence[Evaluation | EvaluationFailure | Failure]:
        if isinstance(result, Failure):
            return [result] * count
        assert isinstance(result, Evaluations)
        if result.note and result.note not in self._noted:
            self._noted.add(result.note)
            self._context.progress.note(result.note)
        return result.results

    def _groups(self, missing: Sequence[_Missing]) -> list[list[_Missing]]:
        """Neighbours by text together, the same samples in one request, about as many requests as workers."""
        groups: list[list[_Missing]] = []
        ordered = sorted(missing, key=lambda each: (each.start, each.size, each.plan.text))
        for _, same in groupby(ordered, key=lambda each: (each.start, each.size)):
            plans = list(same)
            count = max(min(self._context.pool.size, len(plans)), -(-len(plans) // LARGEST_GROUP))
            cuts = [len(plans) * number // count for number in range(count + 1)]
            groups += [plans[first:last] for first, last in pairwise(cuts)]
        return groups

    def _message(self, group: Sequence[_Missing]) -> EvaluatePlans:
        first = group[0]
        return EvaluatePlans(
            plans=tuple(each.plan.text for each in group),
            split=self._split,
            n_samples=None if first.size == self._samples else first.size,
            compensation=self._compensation,
            start=first.start,
            path=self._context.spec.evaluation,
            artifacts=tuple(self._artifacts.get(each.plan.text) for each in group) if self._artifacts else (),
        )

    def _is_own(self, each: evaluations.Evaluation) -> bool:
        """Whether an evaluation has the same compensation, and where maps are given, those."""
        given = self._artifacts.get(each.plan)
        same_maps = given is None or each.artefact_checksum == given.checksum
        return each.compensation == self._compensation and same_maps

    def _longest_prefix(self, plan: str, size: int) -> int:
        """The largest smaller prefix that the plan has scores on; zero when there is none."""
        rungs = [n for (text, n), known in self._own.items() if text == plan and n < size and known.failure is None]
        return max(rungs, default=0)

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

    def _store(self, each: _Missing, result: Evaluation | EvaluationFailure | Failure) -> evaluations.Evaluation:
        context, plan = self._context, each.plan.text
        if not isinstance(result, Evaluation):
            return evaluations.record_failure(
                context.db,
                context.job,
                model_id=context.model_id,
                task_id=context.task_id,
                plan=plan,
                split=self._split,
                split_hash=self._hash,
                rung=each.size,
                reason=result.reason,
                compensation=self._compensation,
                settings=context.settings,
            )
        kept = self._artifacts.get(plan)
        whole = result if each.start == 0 else _joined(self._own[plan, each.start], result)
        stored = evaluations.record(
            context.db,
            context.job,
            model_id=context.model_id,
            task_id=context.task_id,
            plan=plan,
            split=self._split,
            split_hash=self._hash,
            rung=each.size,
            sample_scores=whole.scores,
            seconds=result.seconds,
            secondary=whole.secondary,
            compensation=self._compensation,
            settings=context.settings,
            kl=whole.kl,
            layer_executions=result.layer_executions,
            layer_executions_saved=result.layer_executions_saved,
            artefact=None if kept is None else kept.location,
            artefact_checksum=None if kept is None else kept.checksum,
        )
        self._own[plan, each.size] = stored
        self._count(result)
        return stored

    def _count(self, result: Evaluation) -> None:
        """What was run, in the job's counters; failed samples and near ties are told."""
        context = self._context
        increments = {
            "evaluations": 1.0,
            "samples": float(result.n_samples),
            "evaluation_seconds": result.seconds,
            "layer_executions": float(result.layer_executions),
            "layer_executions_saved": float(result.layer_executions_saved),
            f"evaluations_{result.path}": 1.0,
            "near_ties": float(result.near_ties),
            "failed_samples": float(len(result.failed_samples)),
            "retries": float(context.pool.take_retries()),
        }
        if result.failed_samples:
            sample, reason = next(iter(result.failed_samples.items()))
            context.progress.note(
                f"plan {result.plan}: {len(result.failed_samples)} samples failed and count as wrong, "
                f"first {sample}: {reason}"
            )
        stages.add_counters(context.db, context.job, {name: value for name, value in increments.items() if value})

    def _scores(self, stored: evaluations.Evaluation) -> Scores:
        if stored.failure is None:
            self.secondary[stored.plan] = dict(stored.secondary)
        return Scores(stored.scores, stored.failure, stored.kl)


def _joined(before: evaluations.Evaluation, result: Evaluation) -> Evaluation:
    """The evaluation of a whole prefix: its beginning from an earlier rung, its end from ``result``."""
    n = before.n + result.n_samples
    return replace(
        result,
        scores=(*before.scores, *result.scores),
        secondary={
            name: fsum((before.n * before.secondary[name], result.n_samples * mean)) / n
            for name, mean in result.secondary.items()
        },
        kl=None if before.kl is None or result.kl is None else (*before.kl, *result.kl),
    )
