"""Stage 4: propose candidates and evaluate them on rungs of the search split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from optimizer import criteria
from optimizer.criteria.evidence import STAGE, Evidence, check
from optimizer.errors import UsageFault
from optimizer.job.sections import TRANSFORMERS
from optimizer.registries import METHODS, STRATEGIES, find
from optimizer.search.budget import Budget, rung_sizes
from optimizer.search.constraints import Limits
from optimizer.search.drafting import DraftJudge, Memory, StepCosts
from optimizer.search.latency import LayerTimes, latency_ratio
from optimizer.search.loop import Search
from optimizer.search.problem import Problem, parts_under_way
from optimizer.search.seeding import with_given, with_seeds
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.space import Candidate
from optimizer.search.trial import Scores, SearchOutcome, Trial
from optimizer.stages import warm_start
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.goal_evaluation import GoalEvaluation
from optimizer.stages.profile import cache_sizes
from optimizer.verification.finalists import failure_of, worst_of
from workers.errors import MeasurementError
from workers.messages import LatencyProfile
from workers.redundancy.table import LayerTable
from workers.runtime import SkipPlan

SECONDS = "search_seconds"
"""The job's counter of seconds spent on searching, over all attempts."""


def run(context: JobContext, profile: LayerTimes, table: LayerTable) -> SearchOutcome:
    """Search, or read back what the search found.

    An interrupted search is replayed: the same proposals come again, and those evaluated before are read from the
    database instead of being run.
    """
    context.progress.begin("search", context.spec.search.trials)
    search = partial(_search, context, profile, table)
    outcome: SearchOutcome
    (outcome,) = context.turns.together(partial(context.load_or_compute, "search", SearchOutcome, search))
    return outcome


def limits_of(context: JobContext, profile: LayerTimes) -> Limits:
    """Combine the job's constraints with the predictors of a plan's latency and cache.

    Where an engine judges how fast plans are, the live model's clock leaves none out: it orders them alone. How fast
    drafting is depends on acceptance, so that no drafter is left out before it is evaluated; its cache is added.
    """
    spec = context.spec.constraint
    if context.spec.latency.engine != TRANSFORMERS or context.spec.is_lossless:
        spec = spec.model_copy(update={"max_latency_ms": None, "min_speedup": None})
    profiled = context.spec.search.latency_model == "profile"
    cache = None if spec.max_kv_cache_bytes is None else cache_sizes(context).of
    if cache is not None and context.spec.is_lossless:
        cache = partial(_with_dense, cache)
    return Limits(spec, profile.dense_latency_seconds if profiled else None, cache, context.goals)


def _with_dense(cache: Callable[[SkipPlan], float], plan: SkipPlan) -> float:
    return cache(SkipPlan.dense(len(plan))) + (0.0 if plan.is_dense else cache(plan))


def out_of_reach(context: JobContext, profile: LayerTimes) -> str | None:
    """Explain why no plan can meet the job's limits on latency and cache; None where one may.

    Given plans are tried whatever is predicted of them.
    """
    if context.spec.search.plans:
        return None
    limits = limits_of(context, profile)
    return FeasiblePlans(context.space, limits, partial(latency_ratio, profile)).out_of_reach()


def _search(context: JobContext, profile: LayerTimes, table: LayerTable) -> SearchOutcome:
    def evaluate(requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        # Plans count as done once their whole batch is: until then this tells that they are under way.
        context.progress.advance(0, news=f"{len(requests)} plans on {requests[0][1]} samples each under way")
        yield from scored(requests)

    try:
        problem = _problem(context, profile, table)
        strategy = find(STRATEGIES, context.spec.search.strategy, "search.strategy")(problem)
        at_once = parts_under_way(problem, strategy)
        scored = GoalEvaluation(context, "search", seconds_counter=SECONDS, at_once=at_once)
        with context.turns.beside() as begin:
            outcome = Search(
                problem,
                strategy,
                Budget(context.spec.search, scored.elapsed),
                evaluate=evaluate,
                on_trial=lambda trial: context.progress.advance(news=_news(trial)),
                begin=begin,
            ).run()
    except (RuntimeError, MeasurementError, UsageFault) as error:
        raise JobFailed(str(error)) from None
    context.progress.note(f"search ended: {outcome.stopped_because}")
    if outcome.failed and all(trial.candidate.is_dense for trial in outcome.trials):
        raise JobFailed(f"none of the {len(outcome.failed)} plans tried could be evaluated: {failure_of(outcome)}")
    return outcome


def _problem(context: JobContext, profile: LayerTimes, table: LayerTable) -> Problem:
    spec, space = context.spec, context.space
    drafting = drafting_of(context, profile) if spec.is_lossless else None
    criterion = criteria.load(spec.criterion, spec.thresholds)
    risk = criterion.risk(table)
    weight = 1.0  # published methods are tried as they are
    if spec.search.strategy not in METHODS:
        evidence = context.load_or_compute(STAGE, Evidence, lambda: check(risk, table, criterion.needs))
        weight = evidence.weight
        if evidence.verdict and not evidence.agrees:
            context.progress.note(evidence.verdict)
    ratio = partial(latency_ratio, profile) if drafting is None else drafting.costs.step
    problem = Problem(
        space=space,
        limits=limits_of(context, profile),
        ratio=ratio,
        rungs=rung_sizes(spec.search.rungs, context.search_size),
        risk=risk.weighed(weight),
        trust=weight,
        table=table,
        seed=spec.search.seed,
        batch=spec.search.batch,
        drafting=drafting,
        goals=context.goals,
    )
    if spec.search.strategy in METHODS:
        return problem
    chosen = warm_start.choose(context) if spec.search.warm_start else warm_start.WarmStart()
    known = warm_start.known_candidates(context, chosen, problem)
    seeded = with_seeds(problem, spec.search, known, warm_start.plans_of_other_tasks(chosen, space))
    return with_given(seeded, spec.search.plans)


def drafting_of(context: JobContext, profile: LayerTimes) -> DraftJudge:
    """Return what judges candidates as drafters, from the profile, or from counted layers, and the sizes of memory."""
    info = context.worker
    if isinstance(profile, LatencyProfile):
        costs = StepCosts.of(profile)
    else:
        costs = StepCosts.counted(info.num_layers, context.spec.letters)
    cache = cache_sizes(context).run
    return DraftJudge(costs, Memory(info.weight_bytes + info.num_layers * cache, cache, info.folded_bytes))


def _news(trial: Trial) -> str:
    if trial.drafter is not None:
        return (
            f"{trial.candidate} accepted {trial.accuracy:.3f}, time {trial.drafter.time:.2f} of plain decoding's on "
            f"{trial.n_samples} samples"
        )
    if trial.goals:
        return f"{trial.candidate} {worst_of(trial)}; {trial.n_samples} samples"
    return f"{trial.candidate} {100 * trial.difference:+.1f} points to dense on {trial.n_samples} samples"
