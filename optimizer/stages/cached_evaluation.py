"""Score candidates: read known evaluations from the database, ask the workers for the rest, and store it at once.

Plans of one recipe go to the workers in groups, neighbours by their text, because a worker shares work between plans
that begin alike. Workers divide the samples first, so that groups stay large, and the plans where samples are too few.
A plan that was
scored on a shorter prefix of the split before is only run on the samples that the longer one adds. In a lossless job
the dense model's answers go with the requests, and scores are acceptances.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby, pairwise
from math import fsum

from optimizer.job.inputs import split_hash
from optimizer.search.space import Candidate
from optimizer.search.trial import Scores
from optimizer.stages import dense_answers
from optimizer.stages.context import LEAST_SLICE, JobContext
from storage.queue import stages
from storage.records import evaluations
from storage.records.evaluations import EvaluationKey, EvaluationRecord, EvaluationResult
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
from workers.tasks import Task
from workers.tasks.passages import TextTask

EVERY_SAMPLE_FAILED = "every sample failed"
LARGEST_GROUP = 64
"""Most plans of one request: what a killed job loses, and what one reply holds, stays bounded."""


@dataclass(frozen=True)
class _Missing:
    """A candidate to be run on the samples from ``start`` on, up to the prefix of ``n_samples``."""

    candidate: Candidate
    start: int
    n_samples: int


class CachedEvaluation:
    """Score candidates on prefixes of one split. No plan is run twice on the same samples, not even by another job.

    ``maps`` gives the artifacts of candidates whose fitted maps are kept; other compensated candidates are scored with
    maps that the workers fit. ``task`` is one of the job's several tasks, or of those beside it, or its text; its only
    task when absent. So many calls as ``at_once`` share the workers.
    """

    def __init__(
        self,
        context: JobContext,
        split: str,
        maps: Mapping[Candidate, Artifact] | None = None,
        *,
        task: Task | TextTask | None = None,
        at_once: int = 1,
    ) -> None:
        self._context, self._split, self._maps, self._at_once = context, split, maps or {}, at_once
        self._task, self._name = task or context.task, task.name if task is not None else ""
        self._task_id = context.id_of(self._task)
        self._targets = dense_answers.run(context, split).tokens if context.spec.is_lossless else ()
        self._base = dense_answers.evaluation_settings(context, split)
        # Maps are fitted to the job's task, so on another one, or on a part, scores depend on which that is.
        fitted_on = "" if task is None else f" fitted_on={split_hash(context.task, 'calibration')[:16]}"
        self._fitted = f"{self._base}{fitted_on}"
        self._whole_split = len(self._task.split(split))
        self._counted = context.judged[self._name].size(split) if self._name else self._whole_split
        self._hash = split_hash(self._task, split)
        self._own: dict[Candidate, dict[int, EvaluationRecord]] = {}
        for each in evaluations.for_job(context.db, context.job.id, split, task_id=self._task_id):
            if self._has_same_maps(each):
                self._own.setdefault(_candidate(each), {})[each.n_samples] = each
        self._known = {
            (_candidate(each), each.n_samples): each.id
            for settings in dict.fromkeys([self._base, self._fitted])
            for each in evaluations.known(
                context.db,
                model_id=context.model_id,
                task_id=self._task_id,
                split_hash=self._hash,
                settings=settings,
            )
            if self._has_same_maps(each) and self._settings(each.compensation) == settings
        }
        self._noted: set[str] = set()
        self.secondary: dict[Candidate, dict[str, float]] = {}
        """Secondary metrics of the candidates scored so far, on the largest prefix."""
        self.ran = False
        """Whether anything was sent to the workers; until then all was known."""

    def __call__(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        """Yield each candidate with its scores on so many samples, in any order; scores are stored before."""
        by_recipe: dict[str, list[tuple[Candidate, int]]] = {}
        for candidate, n_samples in requests:
            by_recipe.setdefault(candidate.compensation, []).append((candidate, n_samples))
        for group in by_recipe.values():
            missing: list[_Missing] = []
            for candidate, n_samples in group:
                stored = self._recall(candidate, n_samples)
                if stored is None:
                    missing.append(_Missing(candidate, self._longest_prefix(candidate, n_samples), n_samples))
                else:
                    yield candidate, self._scores(stored)
            self.ran = self.ran or bool(missing)
            yield from self._run(self._groups(missing))

    def _run(self, groups: Sequence[Sequence[_Missing]]) -> Iterator[tuple[Candidate, Scores]]:
        again: list[_Missing] = []
        slices = [(number, cut) for number, group in enumerate(groups) for cut in self._slices(group, len(groups))]
        layers = [_layers_run(group) for group in groups]
        slices.sort(key=lambda each: layers[each[0]] * (each[1][0] - each[1][1]))  # the longest first
        waiting = Counter(number for number, _ in slices)
        arrived: dict[int, dict[int, object]] = {number: {} for number in waiting}
        for index, result in self._context.run([self._message(groups[number], *cut) for number, cut in slices]):
            number, (start, _) = slices[index]
            arrived[number][start] = result
            if len(arrived[number]) < waiting[number]:
                continue
            group, results = groups[number], [found for _, found in sorted(arrived.pop(number).items())]
            if len(group) > 1 and any(isinstance(each, Failure) for each in results):
                again += group  # one of them may have killed the worker: ask for each alone
                continue
            for each, *scored in zip(group, *(self._each(result, len(group)) for result in results), strict=True):
                yield each.candidate, self._scores(self._store(each, _whole(scored)))
        if again:
            yield from self._run([[each] for each in again])

    def _each(self, result: object, count: int) -> Sequence[Evaluation | EvaluationFailure | Failure]:
        if isinstance(result, Failure):
            return [result] * count
        assert isinstance(result, Evaluations)
        self._context.failed_samples.add("calibration", result.failed_calibration)
        if result.note and result.note not in self._noted:
            self._noted.add(result.note)
            self._context.progress.note(f"{self._name}: {result.note}" if self._name else result.note)
        return result.results

    def _groups(self, missing: Sequence[_Missing]) -> list[list[_Missing]]:
        """Neighbours by text together, the same samples in one request, in as few groups as keep all workers busy."""
        groups: list[list[_Missing]] = []
        ordered = sorted(missing, key=lambda each: (each.start, each.n_samples, each.candidate.plan.text))
        for _, same in groupby(ordered, key=lambda each: (each.start, each.n_samples)):
            plans = list(same)
            if self._fits(plans):
                wanted = self._context.pool.size
            else:
                workers = max(1, self._context.pool.size // self._at_once)
                most = (plans[0].n_samples - plans[0].start) // LEAST_SLICE
                wanted = next(n for n in range(1, workers + 1) if workers % n == 0 and workers // n <= max(1, most))
            count = max(min(wanted, len(plans)), -(-len(plans) // LARGEST_GROUP))
            cuts = [len(plans) * number // count for number in range(count + 1)]
            groups += [plans[first:last] for first, last in pairwise(cuts)]
        return groups

    def _slices(self, group: Sequence[_Missing], groups: int) -> list[tuple[int, int]]:
        """Cut a group's samples among the workers that there are for it; not where each would fit the same maps."""
        start, stop = group[0].start, group[0].n_samples
        requests = groups * self._at_once
        return [(start, stop)] if self._fits(group) else self._context.slices(start, stop, requests=requests)

    def _fits(self, group: Sequence[_Missing]) -> bool:
        """Whether workers fit maps for plans of one recipe before they score them."""
        return group[0].candidate.compensation != NO_COMPENSATION and not all(
            self._maps.get(each.candidate) for each in group
        )

    def _message(self, group: Sequence[_Missing], start: int, stop: int) -> EvaluatePlans:
        first = group[0]
        maps = tuple(self._maps.get(each.candidate) for each in group)
        return EvaluatePlans(
            plans=tuple(each.candidate.plan.text for each in group),
            split=self._split,
            n_samples=None if stop == self._whole_split else stop,
            compensation=first.candidate.compensation,
            start=start,
            path=self._context.spec.evaluation,
            artifacts=maps if any(maps) else (),
            targets=self._targets[start:stop],
            text=self._context.inputs.general_text,
            task=self._name,
        )

    def _has_same_maps(self, each: EvaluationRecord) -> bool:
        """Tell whether an evaluation was made with the maps given for its candidate, if any are."""
        given = self._maps.get(_candidate(each))
        return given is None or each.artifact_checksum == given.checksum

    def _settings(self, compensation: str) -> str:
        """Return an evaluation's settings: maps that were fitted without some samples are not those of other jobs."""
        failed = self._context.failed_samples.of("calibration")
        if compensation == NO_COMPENSATION:
            return self._base
        if not failed:
            return self._fitted
        return f"{self._fitted} calibration_without={','.join(sorted(failed))}"

    def _longest_prefix(self, candidate: Candidate, n_samples: int) -> int:
        """Return the largest smaller prefix that the candidate has scores on; zero when there is none."""
        own = self._own.get(candidate, {})
        return max((n for n, each in own.items() if n < n_samples and each.failure is None), default=0)

    def _recall(self, candidate: Candidate, n_samples: int) -> EvaluationRecord | None:
        """Return the evaluation if this or another job has it."""
        own = self._own.setdefault(candidate, {})
        known = self._known.get((candidate, n_samples))
        if n_samples not in own and known is not None:
            own[n_samples] = evaluations.reuse(self._context.db, self._context.job, known)
        return own.get(n_samples)

    def _store(self, each: _Missing, result: Evaluation | EvaluationFailure | Failure) -> EvaluationRecord:
        context, candidate = self._context, each.candidate
        key = EvaluationKey(
            model_id=context.model_id,
            task_id=self._task_id,
            plan=candidate.plan.text,
            compensation=candidate.compensation,
            settings=self._settings(candidate.compensation),
            split=self._split,
            split_hash=self._hash,
            n_samples=each.n_samples,
        )
        if not isinstance(result, Evaluation):
            return evaluations.record_failure(context.db, context.job, key, result.reason)
        marked = {
            sample: result.failed_samples[sample]
            for sample, score in zip(result.sample_ids, result.scores, strict=True)
            if math.isnan(score)
        }
        named = f"{self._split} of {self._name}" if self._name else self._split
        context.failed_samples.add(named, marked, self._counted)
        kept = self._maps.get(candidate)
        whole = result if each.start == 0 else _joined(self._own[candidate][each.start], result)
        if all(map(math.isnan, whole.scores)):
            return evaluations.record_failure(context.db, context.job, key, EVERY_SAMPLE_FAILED)
        found = EvaluationResult(
            scores=whole.scores,
            secondary=whole.secondary,
            kl=whole.kl,
            seconds=result.seconds,
            layer_executions=result.layer_executions,
            layer_executions_saved=result.layer_executions_saved,
            artifact=None if kept is None else kept.location,
            artifact_checksum=None if kept is None else kept.checksum,
        )
        stored = evaluations.record(context.db, context.job, key, found)
        self._own[candidate][each.n_samples] = stored
        self._count(result, set(result.failed_samples) - marked.keys())
        return stored

    def _count(self, result: Evaluation, wrong: Collection[str]) -> None:
        """Add what was run to the job's counters, and note samples that failed and count as ``wrong``."""
        context = self._context
        increments = {
            "evaluations": 1.0,
            "samples": float(result.n_samples),
            "evaluation_seconds": result.seconds,
            "layer_executions": float(result.layer_executions),
            "layer_executions_saved": float(result.layer_executions_saved),
            f"scored{result.path}": 1.0,
            "near_ties": float(result.near_ties),
            "failed_samples": float(len(result.failed_samples)),
            "retries": float(context.pool.take_retries()),
        }
        if wrong:
            sample = min(wrong)
            context.progress.note(
                f"plan {result.plan}: {len(wrong)} samples failed and count as wrong, "
                f"first {sample}: {result.failed_samples[sample]}"
            )
        stages.add_counters(context.db, context.job, {name: value for name, value in increments.items() if value})

    def _scores(self, stored: EvaluationRecord) -> Scores:
        if stored.failure is None:
            self.secondary[_candidate(stored)] = dict(stored.secondary)
        return Scores(stored.scores, stored.failure, stored.kl, stored.secondary)


def _layers_run(group: Sequence[_Missing]) -> int:
    """Count the layers that a worker runs of a sample for plans that share what they begin with."""
    plans = [each.candidate.plan for each in group]
    return len({plan.text[: layer + 1] for plan in plans for layer in plan.kept})


def _candidate(each: EvaluationRecord) -> Candidate:
    return Candidate(SkipPlan.parse(each.plan), each.compensation)


def _answered(scores: Sequence[float]) -> int:
    """Count the samples that did not fail."""
    return len(scores) - sum(map(math.isnan, scores))


def _whole(slices: Sequence[Evaluation | EvaluationFailure | Failure]) -> Evaluation | EvaluationFailure | Failure:
    """Join the evaluations of consecutive samples; the first failure where there is one."""
    found = [each for each in slices if isinstance(each, Evaluation)]
    return (
        reduce(_followed, found)
        if len(found) == len(slices)
        else next(e for e in slices if not isinstance(e, Evaluation))
    )


def _followed(first: Evaluation, then: Evaluation) -> Evaluation:
    return replace(
        _joined(first, then),
        sample_ids=(*first.sample_ids, *then.sample_ids),
        failed_samples=first.failed_samples | then.failed_samples,
        seconds=first.seconds + then.seconds,
        layer_executions=first.layer_executions + then.layer_executions,
        layer_executions_saved=first.layer_executions_saved + then.layer_executions_saved,
        near_ties=first.near_ties + then.near_ties,
        path=first.path if first.path == then.path else "plain",
    )


def _joined(before: EvaluationRecord | Evaluation, result: Evaluation) -> Evaluation:
    """Join an evaluation and ``result``, which continues it, to that of the whole prefix."""
    n_before, n_result = _answered(before.scores), _answered(result.scores)
    n = max(1, n_before + n_result)
    return replace(
        result,
        scores=(*before.scores, *result.scores),
        secondary={
            name: fsum((n_before * before.secondary[name], n_result * mean if n_result else 0.0)) / n
            for name, mean in result.secondary.items()
        },
        kl=None if before.kl is None or result.kl is None else (*before.kl, *result.kl),
    )
