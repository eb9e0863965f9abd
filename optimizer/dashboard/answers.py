"""What the JSON API answers with: every field described, so that the OpenAPI document explains itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from optimizer.job.result import PlanAnswer
from optimizer.reports.data import Specification
from storage.queue.events import Event
from storage.queue.jobs import Job

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


class JobDetail(JobSummary):
    """A job with what it was asked, how it went and what it found."""

    specification: dict[str, Any]
    counters: dict[str, float]
    stages: dict[str, datetime] = Field(description="When each stage was finished.")
    events: list[JobEvent]
    plans: list[PlanAnswer]
    best: int | None = Field(description="Id of the plan that is the job's answer.")


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
