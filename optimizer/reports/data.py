"""What a report shows, read from the database alone; nothing is measured, estimated or filled in here.

Accuracies and drops are shares in [0, 1], times are seconds, a speed-up is dense time / plan time. What a job did not
measure (an older version, a stage not reached) is ``None`` or empty, and shown as "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from optimizer.job.result import JobResult, load_result
from optimizer.reports.specification import Specification
from optimizer.search.latency import ratio_of_text
from optimizer.search.space import touched
from storage.database import Database
from storage.queue import events, stages
from storage.queue.events import Event
from storage.queue.jobs import Job
from storage.records import identities, overview
from storage.records.identities import ModelIdentity, TaskIdentity
from storage.records.measurements import Redundancy, short_name
from storage.records.overview import EvaluationSummary, JobProfile
from storage.records.plans import Plan
from workers.runtime.plan import SkipPlan


@dataclass(frozen=True)
class Tried:
    """A plan that the search scored, on the largest prefix of the search split that it reached."""

    order: int
    """Position among the plans tried, from 1; the dense model is no plan and not counted."""
    plan: str
    compensation: str
    n: int
    accuracy: float
    drop: float | None
    """Accuracy of the dense model on the same samples less this plan's; None where dense was not scored."""
    complete: bool
    """Whether it was scored on the whole search split; otherwise the search gave it up earlier."""
    predicted_speedup: float | None
    """By the additive latency profile; None where there is none for these actions. Never a measured figure."""
    within: bool
    """Whether it meets the job's constraint as far as the search could see (no intervals)."""


@dataclass(frozen=True)
class Failed:
    """A plan that could not be scored, and why."""

    plan: str
    reason: str


@dataclass(frozen=True)
class JobReport:
    """Everything that a job's report shows."""

    job: Job
    spec: Specification
    model: ModelIdentity | None
    """None until a worker has loaded the model."""
    task: TaskIdentity | None
    result: JobResult
    profile: JobProfile | None
    redundancy: tuple[Redundancy, ...]
    tried: tuple[Tried, ...]
    failed: tuple[Failed, ...]
    search_samples: int | None
    """Size of the search split as scored."""
    dense_search_accuracy: float | None
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
    split_hashes: dict[str, str]
    events: tuple[Event, ...]
    ids: tuple[int, int] | None = field(default=None, repr=False)
    """Model and task row, for finding jobs to compare with."""

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The published plans, the fastest first."""
        return self.result.plans

    @property
    def best(self) -> Plan | None:
        """The plan that is the job's answer."""
        return self.result.best

    @property
    def model_name(self) -> str:
        """Last part of the model's name."""
        return short_name(self.spec.model)

    @property
    def task_name(self) -> str:
        """The task's name; the last part of its file while no worker has loaded it."""
        return self.task.name if self.task is not None else short_name(self.spec.task).removesuffix(".yaml")

    @property
    def num_layers(self) -> int | None:
        """Decoder layers of the model."""
        return None if self.model is None else self.model.num_layers


def collect(db: Database, job_id: int, *, profile: JobProfile | None = None) -> JobReport:
    """Read a job in any state; ``profile`` takes the place of its own latency profile, to compare jobs by.

    Raises NotFound.
    """
    result = load_result(db, job_id)
    spec = Specification.of(result.job.spec)
    rows = overview.evaluations(db, job_id)
    profile = profile or overview.latency_profile(db, job_id)
    ids = _ids(rows, profile)
    scored = Scored.of(db, rows, profile, spec)
    return JobReport(
        job=result.job,
        spec=spec,
        model=None if ids is None else identities.model(db, ids[0]),
        task=None if ids is None else identities.task(db, ids[1]),
        result=result,
        profile=profile,
        redundancy=() if ids is None else tuple(overview.redundancy(db, job_id, *ids)),
        tried=scored.tried,
        failed=tuple(Failed(row.plan, row.failure) for row in rows if row.failure is not None),
        search_samples=scored.samples,
        dense_search_accuracy=scored.dense_accuracy,
        evaluations=sum(row.failure is None for row in rows),
        reused=sum(row.reused_from is not None for row in rows),
        layer_executions=sum(row.layer_executions for row in rows if row.reused_from is None),
        layer_executions_saved=sum(row.layer_executions_saved for row in rows if row.reused_from is None),
        counters=stages.counters(db, job_id),
        settings=next((row.settings for row in rows), ""),
        split_hashes={row.split: row.split_hash for row in rows},
        events=tuple(events.for_job(db, job_id)),
        ids=ids,
    )


def _ids(rows: list[EvaluationSummary], profile: JobProfile | None) -> tuple[int, int] | None:
    if profile is not None:
        return profile.model_id, profile.task_id
    return (rows[0].model_id, rows[0].task_id) if rows else None


@dataclass(frozen=True)
class Scored:
    """What the search of a job scored."""

    tried: tuple[Tried, ...]
    samples: int | None
    dense_accuracy: float | None

    @classmethod
    def of(cls, db: Database, rows: list[EvaluationSummary], profile: JobProfile | None, spec: Specification) -> Scored:
        """Each plan on the largest prefix it reached, in the order in which plans were first scored."""
        search = [row for row in rows if row.split == "search" and row.failure is None]
        if not search:
            return cls((), None, None)
        largest: dict[tuple[str, str], EvaluationSummary] = {}
        for row in search:
            known = largest.setdefault((row.plan, row.compensation), row)
            if row.n > known.n:
                largest[row.plan, row.compensation] = row
        dense = next((row for row in largest.values() if SkipPlan.parse(row.plan).is_dense), None)
        samples = max(row.n for row in search) if dense is None else dense.n
        dense_means = _prefix_means(() if dense is None else overview.sample_scores(db, dense.id))
        dense_ms = None if profile is None else 1000 * profile.dense_seconds
        tried: list[Tried] = []
        for row in largest.values():
            if row is dense or row.accuracy is None:
                continue
            drop = dense_means[row.n] - row.accuracy if row.n < len(dense_means) else None
            speedup = _predicted_speedup(profile, row.plan)
            complete = row.n >= samples
            tried.append(
                Tried(
                    order=len(tried) + 1,
                    plan=row.plan,
                    compensation=row.compensation,
                    n=row.n,
                    accuracy=row.accuracy,
                    drop=drop,
                    complete=complete,
                    predicted_speedup=speedup,
                    within=complete
                    and _within(spec.limits, row.accuracy, drop, speedup, dense_ms, touched(SkipPlan.parse(row.plan))),
                )
            )
        return cls(tuple(tried), samples, None if dense is None else dense.accuracy)


def _prefix_means(scores: tuple[float, ...]) -> list[float]:
    """Mean of the first n scores at index n, summed exactly as the evaluations' own accuracies are."""
    if not scores:
        return []
    if all(score in (0.0, 1.0) for score in scores):
        right, means = 0.0, [math.nan]
        for count, score in enumerate(scores, start=1):
            right += score
            means.append(right / count)
        return means
    return [math.nan, *(math.fsum(scores[:count]) / count for count in range(1, len(scores) + 1))]


def _within(
    limits: Mapping[str, float],
    accuracy: float,
    drop: float | None,
    speedup: float | None,
    dense_ms: float | None,
    layers: int,
) -> bool:
    """Whether the limits that a search can judge by are met; the size of the KV cache is measured later."""
    milliseconds = None if speedup is None or dense_ms is None else dense_ms / speedup
    at_most = {"max_accuracy_drop": drop, "max_latency_ms": milliseconds, "max_layers_touched": float(layers)}
    at_least = {"min_accuracy": accuracy, "min_speedup": speedup}
    return all(
        value is not None and value <= limits[name] for name, value in at_most.items() if name in limits
    ) and all(value is not None and value >= limits[name] for name, value in at_least.items() if name in limits)


def _predicted_speedup(profile: JobProfile | None, plan: str) -> float | None:
    """By a profile; None where there is none, or where it lacks an action (another job's may have had fewer)."""
    if profile is None or not profile.layer_seconds.keys() >= set(plan):
        return None
    return 1.0 / ratio_of_text(profile, plan)


def meets_constraint(plan: Plan) -> bool | None:
    """The job's judgement of a published plan; None where it was imported without one."""
    judged = plan.secondary.get("meets_constraint")
    return judged if isinstance(judged, bool) else None
