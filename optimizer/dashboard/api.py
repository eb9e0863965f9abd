"""The part of the API that reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi import Path as PathParameter

from optimizer.dashboard import answers
from optimizer.job.present import PresentVersions
from optimizer.job.result import PlanAnswer, load_result, shown_spec
from optimizer.reports.evaluations import evaluations_frame, samples_frame, table_bytes
from storage.database import Database
from storage.queue import events, jobs, stages
from storage.records import overview, plans
from storage.records.overview import KnownModel, KnownTask
from storage.records.plans import PlanQuery, Sort

LARGEST_ID = 2**63 - 1

router = APIRouter(prefix="/api", tags=["api"])


def database(request: Request) -> Database:
    """Return the database that the application serves."""
    db: Database = request.app.state.database
    return db


Db = Annotated[Database, Depends(database)]
JobId = Annotated[int, PathParameter(ge=1, le=LARGEST_ID, description="Number of the job.")]
PlanId = Annotated[int, PathParameter(ge=1, le=LARGEST_ID, description="Number of the plan.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries to answer with.")]
Name = Annotated[str | None, Query(max_length=300)]

_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": answers.Problem, "description": "There is no such thing."}}
_CONTRADICTORY: dict[int | str, dict[str, Any]] = {
    400: {"model": answers.Problem, "description": "A concurrency without an engine, or the like."}
}
_TABLE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}


@router.get("/jobs")
def list_jobs(
    db: Db,
    state: Annotated[list[answers.State] | None, Query(description="Only these states; repeatable.")] = None,
    limit: Limit = 50,
    before: Annotated[int | None, Query(ge=1, le=LARGEST_ID, description="Go on before this job.")] = None,
) -> list[answers.JobSummary]:
    """Jobs, the newest first."""
    return [answers.JobSummary.of(job) for job in jobs.list_jobs(db, state or (), limit, before)]


@router.get("/jobs/{job_id}", responses=_MISSING)
def show_job(db: Db, job_id: JobId) -> answers.JobDetail:
    """One job with its history and its published plans."""
    result, present = load_result(db, job_id), PresentVersions(db)
    return answers.JobDetail(
        **dict(answers.JobSummary.of(result.job)),
        specification=shown_spec(result.job.spec),
        counters=stages.counters(db, job_id),
        stages={name: stage.recorded_at for name, stage in stages.stages(db, job_id).items()},
        events=events.for_job(db, job_id),
        plans=[PlanAnswer.of(each, present.changes(each)) for each in result.plans],
        best=None if result.best is None else result.best.id,
    )


@router.get("/jobs/{job_id}/evaluations", response_class=Response, responses=_MISSING | _TABLE)
def list_evaluations(
    db: Db,
    job_id: JobId,
    samples: Annotated[bool, Query(description="A row for every sample of every evaluation.")] = False,
) -> Response:
    """All evaluations of a job as CSV, as `skipplan evaluations` writes them."""
    frame = (samples_frame if samples else evaluations_frame)(db, job_id)
    name = f"job-{job_id}-{'samples' if samples else 'evaluations'}.csv"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(table_bytes(frame, Path(name)), media_type="text/csv", headers=headers)


def plan_query(
    model: Annotated[Name, Query(description="Name, path, hub id or fingerprint.")] = None,
    task: Annotated[Name, Query(description="Name of the task.")] = None,
    device: Annotated[Name, Query(description="Device, or a part of its name.")] = None,
    engine: Annotated[
        Name, Query(description="Speed as this engine served the plans (vllm, llama.cpp, ...); no other plans.")
    ] = None,
    concurrency: Annotated[
        int | None, Query(ge=1, le=4096, description="With an engine: requests in flight at once; 1 when absent.")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, Query(ge=0, le=1, description="Largest loss as a share, by the upper end of its interval.")
    ] = None,
    min_speedup: Annotated[float | None, Query(ge=0, le=1000, description="Smallest measured speed-up.")] = None,
    mode: Annotated[
        Literal["standalone", "lossless"], Query(description="lossless: plans that draft, the dense model verifies.")
    ] = "standalone",
    front: Annotated[bool, Query(description="Only members of the Pareto front.")] = False,
    sort: Annotated[Sort, Query(description="Order, the best first.")] = "speedup",
    limit: Limit = 50,
) -> PlanQuery:
    """Read which plans are asked for from the request."""
    return PlanQuery(
        model,
        task,
        device=device,
        engine=engine,
        concurrency=concurrency,
        max_accuracy_drop=max_accuracy_drop,
        min_speedup=min_speedup,
        mode=mode,
        on_front=front,
        sort=sort,
        limit=limit,
    )


AllVersions = Annotated[
    bool, Query(description="Also plans of former model files, data, prompts or metrics; `changed` marks them.")
]


@router.get("/plans", responses=_MISSING | _CONTRADICTORY)
def list_plans(
    db: Db, query: Annotated[PlanQuery, Depends(plan_query)], all_versions: AllVersions = False
) -> list[PlanAnswer]:
    """Return published plans within limits; 404 where model, task or device is not known."""
    present = PresentVersions(db)
    found = plans.list_plans(db, present.resolve(query, all_versions=all_versions))
    return [PlanAnswer.of(each, present.changes(each)) for each in found]


@router.get("/plans/{plan_id}", responses=_MISSING)
def show_plan(db: Db, plan_id: PlanId) -> PlanAnswer:
    """One published plan."""
    plan = plans.get(db, plan_id)
    return PlanAnswer.of(plan, PresentVersions(db).changes(plan))


@router.get("/models")
def list_models(db: Db) -> list[KnownModel]:
    """Every model that a job loaded."""
    return overview.models(db)


@router.get("/tasks")
def list_tasks(db: Db) -> list[KnownTask]:
    """Every version of every task."""
    return overview.tasks(db)


@router.get("/devices")
def list_devices(db: Db) -> list[str]:
    """Return the devices that latency was measured on."""
    return overview.devices(db)
