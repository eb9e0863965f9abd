"""What the JSON API answers with: every field described, so that the OpenAPI document explains itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from optimizer.job.result import layers_by_action
from optimizer.reports.data import Specification, meets_constraint
from storage.queue.events import Event
from storage.queue.jobs import Job
from storage.records.plans import Plan as StoredPlan
from workers.runtime.plan import LEGEND

State = Literal["queued", "running", "succeeded", "infeasible", "failed", "cancelled"]


class Answer(BaseModel):
    """Read from the storage's values by field name."""

    model_config = ConfigDict(from_attributes=True)


class Progress(Answer):
    """Where a running job stands."""

    stage: str | None = Field(default=None, description="The stage the job is at.")
    done: int | None = Field(default=None, description="Steps of the stage that are done.")
    total: int | None = Field(default=None, description="Steps of the stage, where known.")
    news: str | None = Field(default=None, description="The latest of it.")


class JobSummary(Answer):
    """A job in the list."""

    id: int
    state: State
    model: str = Field(description="Path, bundled name or hub id, as the job says it.")
    task: str = Field(description="Name or task file, as the job says it.")
    priority: int
    attempt: int
    progress: Progress
    error: str | None = Field(description="Why it failed, was cancelled, or found no plan.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobEvent(Answer):
    """One entry of a job's history."""

    id: int
    at: datetime
    attempt: int
    kind: str
    message: str


class Plan(Answer):
    """A published plan. Accuracies are shares in [0, 1], differences shares of accuracy, times seconds."""

    id: int
    job_id: int | None = Field(description="None for plans that were imported.")
    model: str
    fingerprint: str = Field(description="SHA-256 of the model's configuration and weights.")
    task: str
    device: str
    workload: str
    plan: str = Field(description=f"One letter a layer: {LEGEND}.")
    layers: dict[str, list[int]] = Field(description="Layers that do other than run, by action.")
    compensation: str
    origin: str = Field(description="measured here, or imported.")
    on_front: bool = Field(description="Whether no plan of its group is better in accuracy and speed.")
    meets_constraint: bool | None = Field(description="By the limits of its job; null where that is not known.")
    n: int = Field(description="Held-out samples.")
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    dense_accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    confidence: float
    dense_seconds: float
    seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    dense_kv_cache_bytes: int
    kv_cache_bytes: int
    layers_touched: int
    published_at: datetime


class JobDetail(JobSummary):
    """A job with what it was asked, how it went and what it found."""

    specification: dict[str, Any]
    counters: dict[str, float]
    stages: dict[str, datetime] = Field(description="When each stage was finished.")
    events: list[JobEvent]
    plans: list[Plan]
    best: int | None = Field(description="Id of the plan that is the job's answer.")


class Model(Answer):
    """A model that some job loaded."""

    id: int
    name: str = Field(description="The name it was last loaded under.")
    fingerprint: str
    family: str
    num_layers: int
    parameters: int
    plans: int = Field(description="How many plans are published for it.")


class Task(Answer):
    """One version of a task's data and splits."""

    id: int
    name: str
    data_hash: str
    split_seed: int
    calibration_size: int
    search_size: int
    held_out_size: int
    plans: int


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


def job_fields(job: Job) -> dict[str, Any]:
    """A stored job as the fields of ``JobSummary``."""
    spec = Specification.of(job.spec)
    names = ("id", "state", "priority", "attempt", "error", "created_at", "started_at", "finished_at")
    known = {name: job.progress.get(name) for name in Progress.model_fields}
    return {name: getattr(job, name) for name in names} | {
        "model": spec.model,
        "task": spec.task,
        "progress": Progress(**known),
    }


def job_summary(job: Job) -> JobSummary:
    """A stored job for the list."""
    return JobSummary(**job_fields(job))


def job_event(event: Event) -> JobEvent:
    """An entry of the history."""
    return JobEvent.model_validate(event)


def plan(stored: StoredPlan) -> Plan:
    """A stored plan with its layers spelt out."""
    known = {name: getattr(stored, name) for name in Plan.model_fields if hasattr(stored, name)}
    return Plan(**known, layers=layers_by_action(stored.plan), meets_constraint=meets_constraint(stored))
