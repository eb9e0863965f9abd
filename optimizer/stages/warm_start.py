"""Warm-start a search from earlier jobs: evaluations of the model on the same samples, and plans of other tasks.

The choice is persisted before the first proposal, so that a resumed search is replayed with the same knowledge
whatever other jobs have found out meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from optimizer.job.inputs import split_hash
from optimizer.job.result import losses
from optimizer.search.problem import Problem
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.trial import Scores, Trial
from optimizer.stages import dense_answers
from optimizer.stages.context import JobContext
from storage.records import evaluations, lookup, plans
from storage.records.evaluations import EvaluationRecord
from storage.records.plans import Plan, PlanQuery
from workers.runtime import SkipPlan
from workers.tasks.joint import JOINED_BY

MOST_PLANS = 16
"""Plans of other tasks that are tried first, the fastest of their fronts."""


@dataclass(frozen=True)
class WarmStart:
    """Ids of evaluations that are known, and candidates (plan, compensation) that did well on other tasks."""

    evaluations: tuple[int, ...] = ()
    plans: tuple[tuple[str, str], ...] = ()


def choose(context: JobContext) -> WarmStart:
    """Choose what to take over, or read the choice of an earlier attempt back."""
    return context.load_or_compute("warm start", WarmStart, lambda: _choose(context))


def _choose(context: JobContext) -> WarmStart:
    largest: dict[tuple[str, str], EvaluationRecord] = {}
    for each in _known(context) if context.goals is None else ():  # of several tasks, scores are found one by one
        key = (each.plan, each.compensation)
        if each.job_id != context.job.id and (key not in largest or largest[key].n_samples < each.n_samples):
            largest[key] = each
    elsewhere = [
        (plan.plan, plan.compensation)
        for plan in plans.list_plans(context.db, PlanQuery(mode=context.spec.mode, on_front=True, limit=None))
        if plan.model_id == context.model_id and not _shares_data(context, plan)
    ]
    return WarmStart(
        tuple(sorted(each.id for each in largest.values())),
        tuple(dict.fromkeys(elsewhere))[:MOST_PLANS],
    )


def _shares_data(context: JobContext, plan: Plan) -> bool:
    """Whether a plan was chosen with data of this job: with samples that are held out here."""
    task = lookup.task(context.db, plan.task_id)
    names = {task.name, *task.name.split(JOINED_BY), *(each.name for each in losses(plan))}
    versions = [each for each in lookup.task_versions(context.db) if each.name in names]
    hashes = {each.data_hash for each in (task, *versions)} - {""}
    return any(
        own.data_hash in hashes or own.name in names
        for own in (context.task, *context.task.parts, *context.task.beside)
    )


def _known(context: JobContext) -> list[EvaluationRecord]:
    return evaluations.known(
        context.db,
        model_id=context.model_id,
        task_id=context.task_id,
        split_hash=split_hash(context.task, "search"),
        settings=dense_answers.evaluation_settings(context, "search"),
    )


def known_candidates(context: JobContext, chosen: WarmStart, problem: Problem) -> tuple[Trial, ...]:
    """Turn the evaluations taken over into trials; none where dense is not among them to compare with."""
    wanted = frozenset(chosen.evaluations)
    taken = [each for each in _known(context) if each.id in wanted]
    dense = SkipPlan.dense(problem.space.num_layers)
    reference = next((each for each in taken if each.plan == dense.text), None)
    samples = len(context.task.search)
    if reference is None or reference.n_samples < samples:
        return ()
    found = []
    for each in taken:
        candidate = Candidate(SkipPlan.parse(each.plan), each.compensation)
        if candidate in problem.space and not candidate.is_dense:
            scores = Scores(each.scores, kl=each.kl, secondary=each.secondary)
            trial = problem.trial(candidate, scores, Scores(reference.scores))
            found.append(replace(trial, from_earlier=True))
    return tuple(found)


def plans_of_other_tasks(chosen: WarmStart, space: PlanSpace) -> tuple[Candidate, ...]:
    """List the candidates of this space that did well on other tasks."""
    found = [Candidate(SkipPlan.parse(plan), compensation) for plan, compensation in chosen.plans]
    return tuple(candidate for candidate in found if candidate in space)
