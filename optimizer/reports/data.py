"""Read a job's report from the database alone; nothing is measured, estimated or filled in here.

Accuracies are shares in [0, 1], times are seconds, a speed-up is dense time / plan time. Figures that a job did not
measure (an older version, a stage not reached) are ``None`` or empty, and shown as "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from optimizer.criteria.evidence import STAGE, Evidence
from optimizer.job.result import JobResult, load_result, meets_constraint, task_names, tasks_of_job
from optimizer.reports.evaluations import names_of_tasks
from optimizer.reports.heights import Objective, allowed_loss
from optimizer.search.goals import Goal, Goals
from optimizer.search.latency import ratio_of_text
from optimizer.search.space import touched
from optimizer.search.trial import DraftValue, GoalFigures, answered_by_both
from storage.database import Database
from storage.pareto import STANDALONE
from storage.queue import events, stages
from storage.queue.events import Event
from storage.queue.jobs import Job
from storage.records import evaluations, lookup, measurements
from storage.records.evaluations import EvaluationSummary
from storage.records.lookup import ModelRecord, TaskRecord, short_name
from storage.records.measurements import ProfileRecord, Redundancy
from storage.records.plans import Plan
from workers.runtime.plan import SkipPlan


@dataclass(frozen=True)
class Specification:
    """Parts of a stored job's specification that reports name, whatever its version: a field that is absent is None."""

    model: str
    revision: str | None
    task: str
    limits: dict[str, float] = field(default_factory=dict)
    """The constraint's numbers by field, those that were set."""
    search: dict[str, Any] = field(default_factory=dict)
    criterion: str | None = None
    """None for jobs of before criteria had names."""
    thresholds: dict[str, float] | None = None
    mode: str = STANDALONE
    goals: Goals | None = None
    """Of a job that judges by several losses: their limits, its tasks first; sizes are not stored (0)."""
    tasks: tuple[str, ...] = ()
    """Names of its tasks, in order; of files their last part."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Specification:
        """Read the specification that a job was stored with."""
        model = _section(stored, "model")
        limits = {
            name: float(value)
            for name, value in _section(stored, "constraint").items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        return cls(
            model=str(model.get("path", "unknown model")),
            revision=model.get("revision"),
            task=tasks_of_job(stored),
            limits=limits,
            search=_section(stored, "search"),
            criterion=stored.get("criterion"),
            thresholds=stored.get("thresholds"),
            mode=str(stored.get("mode", STANDALONE)),
            goals=_goals(stored),
            tasks=tuple(sorted(map(_name, task_names(stored)))),
        )

    @property
    def allowed_loss(self) -> float | None:
        """Largest loss as a share, of several what the search may come to; None where the job set no limit."""
        return self.limits.get("max_accuracy_drop") if self.goals is None else allowed_loss(self.goals)

    @property
    def objective(self) -> Objective:
        """How the search makes one number of several losses; worst where there is one."""
        return "worst" if self.goals is None else self.goals.objective

    @property
    def strategy(self) -> str:
        """The search in a few words: its strategy (formerly the sampler) and seed."""
        name = self.search.get("strategy") or self.search.get("sampler") or "search"
        seed = self.search.get("seed")
        return str(name) if seed is None else f"{name}, seed {seed}"


def _section(stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = stored.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _name(task: str) -> str:
    """Return the name of a task that a job file gives by name or file."""
    return short_name(task).removesuffix(".yaml")


def _goals(stored: Mapping[str, Any]) -> Goals | None:
    collateral = _section(stored, "collateral")
    several, drop, kl = stored.get("tasks") or (), collateral.get("max_accuracy_drop"), collateral.get("max_kl")
    if not several and drop is None and kl is None:
        return None
    found = [
        Goal(_name(own["task"]), 0, own.get("max_accuracy_drop"), own.get("min_accuracy"), own.get("weight", 1.0))
        for own in several or [_section(stored, "constraint") | {"task": tasks_of_job(stored)}]
    ]
    if drop is not None:
        found += [Goal(_name(name), 0, drop, weight=0.0) for name in collateral.get("tasks") or ()]
    if kl is not None:
        found.append(Goal("text", 0, kl, weight=0.0, is_text=True))
    found.sort(key=lambda goal: (not goal.weight, goal.is_text, goal.name))
    return Goals(tuple(found), _section(stored, "search").get("objective", "worst"))


@dataclass(frozen=True)
class TrialSummary:
    """A trial of the search without its errors: a plan's figures on the largest prefix of the split that it reached."""

    order: int
    """Position among the plans tried, from 1; the dense model is no plan and not counted."""
    plan: str
    compensation: str
    n_samples: int
    accuracy: float
    difference: float | None
    """Accuracy less the dense model's on the same samples; None where dense was not scored."""
    complete: bool
    """Whether it was scored on the whole search split; otherwise the search gave it up earlier."""
    predicted_speedup: float | None
    """By the additive latency profile; None where there is none for these actions. Never a measured figure."""
    within: bool
    """Whether it meets the job's constraint as far as the search could see (no intervals)."""
    drafter: DraftValue | None = None
    """Of a lossless job, once its search has ended."""
    goals: tuple[GoalFigures, ...] = ()
    """Of a job that judges by several losses; ``difference`` is then minus what its search minimised."""


@dataclass(frozen=True)
class JobReport:
    """Everything that a job's report shows."""

    job: Job
    spec: Specification
    model: ModelRecord | None
    """None until a worker has loaded the model."""
    task: TaskRecord | None
    result: JobResult
    profile: ProfileRecord | None
    redundancy: tuple[Redundancy, ...]
    trials: tuple[TrialSummary, ...]
    failed: tuple[tuple[str, str], ...]
    """Plans that could not be scored, and why."""
    search_samples: int | None
    """Size of the search split as scored."""
    evaluations: int
    """Rows of scores that this job wrote, dense and partial ones included."""
    reused: int
    """Of these, taken over from earlier jobs."""
    layer_executions: int
    """Decoder layers run on a sample, summed over all evaluations; 0 where they were not counted."""
    layer_executions_saved: int
    """Of those that evaluating one plan after another would have taken, how many were not needed."""
    counters: dict[str, float]
    settings: str
    split_hashes: dict[tuple[str, str], str]
    """By the name of what was scored, a task or text, and the split."""
    events: tuple[Event, ...]
    evidence: Evidence | None = None
    """How the criterion agreed with removals when the search began; None where that was not recorded."""
    ids: tuple[int, int] | None = field(default=None, repr=False)
    """Model and task row."""
    ids_scored: tuple[int, int] | None = field(default=None, repr=False)
    """Model and task row of its first evaluation, for finding jobs to compare with; of several tasks one's."""

    @property
    def plans(self) -> tuple[Plan, ...]:
        return self.result.plans

    @property
    def best(self) -> Plan | None:
        return self.result.best

    @property
    def model_name(self) -> str:
        return short_name(self.spec.model)

    @property
    def task_name(self) -> str:
        """The task's name; the last part of its file while no worker has loaded it."""
        return self.task.name if self.task is not None else "+".join(self.spec.tasks)

    @property
    def num_complete(self) -> int:
        """Trials on the whole search split."""
        return sum(each.complete for each in self.trials)

    @property
    def num_meeting(self) -> int:
        """Published plans that meet the job's constraint."""
        return sum(meets_constraint(plan) is True for plan in self.plans)

    @property
    def awaits_trials(self) -> bool:
        """Whether what was tried is not known yet: trials by several losses are read once their search has ended."""
        return self.spec.goals is not None and self.search_samples is None

    def scored_alike(self, other: JobReport) -> bool:
        """Tell whether both jobs scored the same model on the same search samples, by the same losses and limits."""
        own, theirs = (
            {task: value for (task, split), value in report.split_hashes.items() if split == "search"}
            for report in (self, other)
        )
        return self.ids is not None and (self.ids, own, self.spec.goals) == (other.ids, theirs, other.spec.goals)

    def is_answer(self, plan: Plan) -> bool:
        """Whether this is the plan that the job ended with."""
        return self.best is not None and plan.id == self.best.id


def collect(db: Database, job_id: int, *, profile: ProfileRecord | None = None) -> JobReport:
    """Read a job in any state; ``profile`` takes the place of its own latency profile, to compare jobs by.

    Raises NotFound.
    """
    result = load_result(db, job_id)
    spec = Specification.of(result.job.spec)
    rows = evaluations.summaries(db, job_id)
    profile = profile or measurements.profile_of_job(db, job_id)
    ids = _ids(db, spec, (profile, *result.plans), rows)
    model_id = next((each.model_id for each in (profile, *result.plans, *rows) if each is not None), None)
    names = names_of_tasks(db, rows)
    if spec.goals is not None:
        trials, samples = _judged_by_several(db, job_id, profile, spec)
    else:
        trials, samples = _trials(db, rows, profile, spec, has_failed_samples=bool(result.failed_samples))
    return JobReport(
        job=result.job,
        spec=spec,
        model=None if model_id is None else lookup.model(db, model_id),
        task=None if ids is None else lookup.task(db, ids[1]),
        result=result,
        profile=profile,
        redundancy=() if ids is None else tuple(measurements.redundancy_of_job(db, job_id, *ids)),
        trials=trials if spec.mode == STANDALONE else _as_drafters(trials, _drafters(db, job_id), spec.limits),
        failed=tuple((row.plan, row.failure) for row in rows if row.failure is not None),
        search_samples=samples,
        evaluations=sum(row.failure is None for row in rows),
        reused=sum(row.reused_from is not None for row in rows),
        layer_executions=sum(row.layer_executions for row in rows if row.reused_from is None),
        layer_executions_saved=sum(row.layer_executions_saved for row in rows if row.reused_from is None),
        counters=stages.counters(db, job_id),
        settings=next((row.settings for row in rows), ""),
        split_hashes={(names[row.task_id], row.split): row.split_hash for row in rows},
        events=tuple(events.for_job(db, job_id)),
        evidence=_evidence(db, job_id),
        ids=ids,
        ids_scored=(rows[0].model_id, rows[0].task_id) if rows else ids,
    )


def _ids(
    db: Database,
    spec: Specification,
    found: Sequence[ProfileRecord | Plan | None],
    rows: Sequence[EvaluationSummary],
) -> tuple[int, int] | None:
    """Return the rows of a job's model and task; evaluations of several tasks are of one each, not of the joint one."""
    known = next((each for each in found if each is not None), None)
    if known is not None:
        return known.model_id, known.task_id
    if not rows or len(spec.tasks) == 1:
        return (rows[0].model_id, rows[0].task_id) if rows else None
    versions = (each.id for each in lookup.task_versions(db) if each.name == "+".join(spec.tasks))
    latest = next(versions, None)
    return None if latest is None else (rows[0].model_id, latest)


def _as_drafters(
    trials: Sequence[TrialSummary], drafters: Mapping[tuple[str, str], DraftValue], limits: Mapping[str, float]
) -> tuple[TrialSummary, ...]:
    """Take a trial's speed from its drafts, which limits on time are not judged by before they are measured."""
    most = limits.get("max_layers_touched", math.inf)
    found = []
    for each in trials:
        own = drafters.get((each.plan, each.compensation))
        speedup = None if own is None else 1.0 / own.time
        within = each.complete and touched(SkipPlan.parse(each.plan)) <= most
        found.append(replace(each, drafter=own, predicted_speedup=speedup, within=within))
    return tuple(found)


def _evidence(db: Database, job_id: int) -> Evidence | None:
    recorded = stages.get(db, job_id, STAGE)
    return None if recorded is None else TypeAdapter(Evidence).validate_python(recorded.payload["value"])


def _drafters(db: Database, job_id: int) -> dict[tuple[str, str], DraftValue]:
    """Read what the search of a lossless job made of its trials, by plan and compensation."""
    recorded = stages.get(db, job_id, "search")
    trials = [] if recorded is None else recorded.payload["value"]["trials"]
    return {(each["plan"], each["compensation"]): DraftValue(**each["drafter"]) for each in trials if each["drafter"]}


def _trials(
    db: Database,
    rows: list[EvaluationSummary],
    profile: ProfileRecord | None,
    spec: Specification,
    *,
    has_failed_samples: bool,
) -> tuple[tuple[TrialSummary, ...], int | None]:
    """Each plan on the largest prefix it reached, in the order first scored; and the size of the search split."""
    search = [row for row in rows if row.split == "search" and row.failure is None]
    if not search:
        return (), None
    largest: dict[tuple[str, str], EvaluationSummary] = {}
    for row in search:
        known = largest.setdefault((row.plan, row.compensation), row)
        if row.n_samples > known.n_samples:
            largest[row.plan, row.compensation] = row
    dense = next((row for row in largest.values() if SkipPlan.parse(row.plan).is_dense), None)
    samples = max(row.n_samples for row in search) if dense is None else dense.n_samples
    dense_scores = () if dense is None else evaluations.sample_scores(db, dense.id)
    sizes = {row.n_samples for row in search if row.n_samples <= len(dense_scores)}
    dense_means = {n: _mean(dense_scores[:n]) for n in sizes}
    dense_ms = None if profile is None else 1000 * profile.dense_latency_seconds
    trials: list[TrialSummary] = []
    for row in largest.values():
        if row is dense or row.accuracy is None:
            continue
        difference = row.accuracy - dense_means[row.n_samples] if row.n_samples in dense_means else None
        if has_failed_samples and difference is not None:  # on the samples that both answered
            pairs = answered_by_both(dense_scores[: row.n_samples], evaluations.sample_scores(db, row.id))
            difference = math.fsum(pairs[1]) / len(pairs[1]) - math.fsum(pairs[0]) / len(pairs[0])
        trial = TrialSummary(
            order=len(trials) + 1,
            plan=row.plan,
            compensation=row.compensation,
            n_samples=row.n_samples,
            accuracy=row.accuracy,
            difference=difference,
            complete=row.n_samples >= samples,
            predicted_speedup=_predicted_speedup(profile, row.plan),
            within=False,
        )
        trials.append(replace(trial, within=trial.complete and _within(spec.limits, trial, dense_ms)))
    return tuple(trials), samples


_GOALS = TypeAdapter(tuple[GoalFigures, ...])


def _judged_by_several(
    db: Database, job_id: int, profile: ProfileRecord | None, spec: Specification
) -> tuple[tuple[TrialSummary, ...], int | None]:
    """Read what the search of a job with several goals made of its trials, once it has ended."""
    recorded = stages.get(db, job_id, "search")
    if recorded is None:
        return (), None
    outcome = recorded.payload["value"]
    dense_ms = None if profile is None else 1000 * profile.dense_latency_seconds
    speed = {name: limit for name, limit in spec.limits.items() if name not in ("max_accuracy_drop", "min_accuracy")}
    trials: list[TrialSummary] = []
    for each in outcome["trials"]:
        if SkipPlan.parse(each["plan"]).is_dense:
            continue
        goals = _GOALS.validate_python(each["goals"])
        trial = TrialSummary(
            order=len(trials) + 1,
            predicted_speedup=_predicted_speedup(profile, each["plan"]),
            within=False,
            goals=goals,
            **{
                name: each[name] for name in ("plan", "compensation", "n_samples", "accuracy", "difference", "complete")
            },
        )
        keeps = all(goal.limit is None or goal.loss <= goal.limit for goal in goals)
        trials.append(replace(trial, within=trial.complete and keeps and _within(speed, trial, dense_ms)))
    return tuple(trials), outcome["n_samples"]


def _mean(scores: Sequence[float]) -> float:
    """Mean over the samples that did not fail, summed exactly, as evaluations' accuracies are."""
    answered = [score for score in scores if not math.isnan(score)]
    return math.fsum(answered) / len(answered)


def _within(limits: Mapping[str, float], trial: TrialSummary, dense_ms: float | None) -> bool:
    """Whether the limits that a search can judge by are met; the size of the KV cache is measured later."""
    speedup, difference = trial.predicted_speedup, trial.difference
    at_most = {
        "max_accuracy_drop": None if difference is None else -difference,
        "max_latency_ms": None if speedup is None or dense_ms is None else dense_ms / speedup,
        "max_layers_touched": float(touched(SkipPlan.parse(trial.plan))),
    }
    at_least = {"min_accuracy": trial.accuracy, "min_speedup": speedup}
    return all(
        value is not None and value <= limits[name] for name, value in at_most.items() if name in limits
    ) and all(value is not None and value >= limits[name] for name, value in at_least.items() if name in limits)


def _predicted_speedup(profile: ProfileRecord | None, plan: str) -> float | None:
    """By a profile; None where there is none, or where it lacks an action (another job's may have had fewer)."""
    if profile is None or not profile.layer_seconds.keys() >= set(plan):
        return None
    return 1.0 / ratio_of_text(profile, plan)
