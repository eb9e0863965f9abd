"""Describe the answers of the JSON API field by field, so that the OpenAPI document explains itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from optimizer.job.result import PlanAnswer
from optimizer.reports.data import Specification
from storage.queue.events import Event
from storage.queue.jobs import Job

State = Literal["queued", "running", "succeeded", "infeasible", "failed", "cancelled"]


class Progress(BaseModel):
    """Where a running job stands."""

    stage: str | None = Field(default=None, description="The stage the job is at.")
    done: int | None = Field(default=None, description="Steps of the stage that are done.")
    total: int | None = Field(default=None, description="Steps of the stage, where known.")
    news: str | None = Field(default=None, description="The latest of it.")


class JobSummary(BaseModel):
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

    @classmethod
    def of(cls, job: Job) -> JobSummary:
        """Summarize a stored job."""
        spec = Specification.of(job.spec)
        stored = {name: getattr(job, name) for name in JobSummary.model_fields if hasattr(job, name)}
        progress = Progress(**{name: job.progress.get(name) for name in Progress.model_fields})
        return JobSummary(**stored | {"model": spec.model, "task": spec.task, "progress": progress})


class JobDetail(JobSummary):
    """A job with what it was asked, how it went and what it found."""

    specification: dict[str, Any]
    counters: dict[str, float]
    stages: dict[str, datetime] = Field(description="When each stage was finished.")
    events: list[Event]
    plans: list[PlanAnswer]
    best: int | None = Field(description="Id of the plan that is the job's answer.")


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
