"""Stage 3: propose candidates and evaluate them on rungs of the search split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from optimizer import criteria
from optimizer.errors import UsageFault
from optimizer.registries import METHODS, STRATEGIES, find
from optimizer.search.budget import Budget
from optimizer.search.constraints import Limits
from optimizer.search.latency import LayerTimes, latency_ratio
from optimizer.search.loop import Search
from optimizer.search.problem import Problem
from optimizer.search.rungs import rung_sizes
from optimizer.search.seeding import with_given, with_seeds
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.space import Candidate, plan_space
from optimizer.search.trial import Scores, SearchOutcome, Tried
from optimizer.stages import kv_cache, warm_start
from optimizer.stages.cached_evaluation import Evaluator
from optimizer.stages.context import JobContext, JobFailed
from storage.queue import stages
from workers.errors import MeasurementError
from workers.redundancy.table import LayerTable
from workers.runtime import SkipPlan

SECONDS = "search_seconds"
"""The job's counter of seconds spent on searching, over all attempts."""


def run(context: JobContext, profile: LayerTimes, table: LayerTable) -> SearchOutcome:
    """Search, or read back what the search found.

    An interrupted search is replayed: the same proposals come again, and those evaluated before are read from the
    database instead of being run.
    """
    context.progress.begin("search", context.spec.search.evaluations)
    return context.once("search", SearchOutcome, lambda: _search(context, profile, table))


def limits_of(context: JobContext, profile: LayerTimes) -> Limits:
    """The job's constraints, with what predicts a plan's latency and cache."""
    spec = context.spec.constraint
    measured = context.spec.search.latency == "measured"
    cache = None if spec.max_kv_cache_bytes is None else kv_cache.measured(context).of
    return Limits(spec, profile.dense_seconds if measured else None, cache)


def out_of_reach(context: JobContext, profile: LayerTimes) -> str | None:
    """Why no plan at all can meet the job's constraint, as far as latency and cache tell; None where one may.

    Given plans are tried whatever is predicted of them.
    """
    if context.spec.search.plans:
        return None
    space = plan_space(context.spec, context.worker)
    return FeasiblePlans(space, limits_of(context, profile), partial(latency_ratio, profile)).out_of_reach()


def _search(context: JobContext, profile: LayerTimes, table: LayerTable) -> SearchOutcome:
    evaluate = Candidates(context)
    try:
        problem = _problem(context, profile, table)
        search = Search(
            problem,
            find(STRATEGIES, context.spec.search.strategy, "search.strategy")(problem),
            Budget(context.spec.search, evaluate.elapsed),
            evaluate=evaluate,
            on_tried=lambda tried: context.progress.advance(news=_news(tried)),
        )
        outcome = search.run()
    except (RuntimeError, MeasurementError, UsageFault) as error:
        raise JobFailed(str(error)) from None
    context.progress.note(f"search ended: {outcome.stopped_because}")
    return outcome


def _problem(context: JobContext, profile: LayerTimes, table: LayerTable) -> Problem:
    spec, space = context.spec, plan_space(context.spec, context.worker)
    ratio = partial(latency_ratio, profile)
    problem = Problem(
        space=space,
        limits=limits_of(context, profile),
        ratio=ratio,
        rungs=rung_sizes(spec.search.rungs, len(context.task.search)),
        risk=criteria.load(spec.criterion, spec.thresholds).risk(table),
        table=table,
        seed=spec.search.seed,
        batch=spec.search.batch,
    )
    if spec.search.strategy in METHODS:
        return problem
    chosen = warm_start.choose(context) if spec.search.warm_start else warm_start.WarmStart()
    known = warm_start.known_candidates(context, chosen, space, ratio)
    seeded = with_seeds(problem, spec.search, known, warm_start.plans_of_other_tasks(chosen, space))
    return with_given(seeded, spec.search.plans)


class Candidates:
    """Evaluates candidates, whatever their compensation, and keeps the time that took."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._evaluators: dict[str, Evaluator] = {}
        self._before = stages.counters(context.db, context.job.id).get(SECONDS, 0.0)
        self._spent = 0.0
        self._last: float | None = None

    def __call__(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        """Yield each candidate with its scores on so many samples, in any order."""
        started = time.monotonic()
        by_recipe: dict[str, list[tuple[SkipPlan, int]]] = {}
        for candidate, size in requests:
            by_recipe.setdefault(candidate.compensation, []).append((candidate.plan, size))
        for recipe, plans in by_recipe.items():
            evaluator = self._evaluators.get(recipe)
            if evaluator is None:
                evaluator = self._evaluators[recipe] = Evaluator(self._context, "search", recipe)
            for plan, scores in evaluator(plans):
                yield Candidate(plan, recipe), scores
        self._count(started)

    def elapsed(self) -> float:
        """Seconds of searching over all attempts; 0 while a resumed search is replayed without running anything."""
        return 0.0 if self._last is None else self._before + self._spent

    def _count(self, started: float) -> None:
        """Take the time since the last request that ran anything, the time of proposing included."""
        if not any(evaluator.ran for evaluator in self._evaluators.values()):
            return
        now = time.monotonic()
        seconds = now - (started if self._last is None else self._last)
        self._spent, self._last = self._spent + seconds, now
        stages.add_counters(self._context.db, self._context.job, {SECONDS: seconds})


def _news(tried: Tried) -> str:
    return f"{tried.candidate} drop {100 * tried.drop:+.1f} points on {tried.n} samples"
