"""The part of the API that writes: submit a job, cancel it, resume it, change its priority."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from optimizer.dashboard import answers, policy
from optimizer.dashboard.access import Caller
from optimizer.dashboard.api import Db, JobId
from optimizer.dashboard.limits import Room
from optimizer.job.inputs import prepare
from optimizer.job.loading import read_spec
from storage.database import Database
from storage.queue import jobs, submissions
from storage.queue.jobs import Job
from storage.queue.submissions import Wanted

router = APIRouter(prefix="/api", tags=["control"])

_preparing = Room(working=2, waiting=8, seconds=20)
"""Reading a job's data and hashing its model takes processors and disk."""


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    meaning = {
        400: "The job or the request is not as it must be; the detail names the field.",
        401: "No token, or one that is not valid.",
        403: "The token's role does not allow it.",
        404: "There is no such thing.",
        408: "The body did not arrive in time.",
        409: "The job's state does not allow it, or the idempotency key was used for another request.",
        413: "The body is too large.",
        429: "Too many requests; Retry-After says when to come again.",
        503: "The service is busy, or its database cannot be reached; come again later.",
    }
    return {code: {"model": answers.Problem, "description": meaning[code]} for code in codes}


WRITING = _refusals(400, 401, 403, 404, 408, 409, 413, 429, 503)


class JobRequest(BaseModel):
    """A job to queue."""

    model_config = ConfigDict(extra="forbid")

    job: dict[str, Any] = Field(description="The fields of a job file, see docs/jobs.md.")
    force: bool = Field(default=False, description="Queue it even if there is a result of the same job already.")


class Submitted(BaseModel):
    """A submitted job."""

    job: answers.JobSummary
    new: bool = Field(description="Whether it was queued by this request, and not found.")


class PriorityRequest(BaseModel):
    """A job's new priority."""

    model_config = ConfigDict(extra="forbid")

    priority: int = Field(ge=-1000, le=1000, description="Higher ones are taken first; above 0 takes the role admin.")


KNOWN: dict[int | str, dict[str, Any]] = {200: {"model": Submitted, "description": "The job was there already."}}


def requires(role: str) -> Callable[[Request], Caller]:
    """Return a dependency that gives who asks. It raises HTTPException where the role does not suffice."""

    def check(request: Request) -> Caller:
        caller: Caller = request.state.caller
        if not caller.may(role) or caller.token is None:
            raise HTTPException(403, f"token {caller.name} has the role {caller.role}; this takes the role {role}")
        return caller

    return check


Submitter = Annotated[Caller, Depends(requires("submit"))]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="Chosen by the client: the same request under the same key is done once, however often it is sent.",
    ),
]


async def content_hash(request: Request) -> str:
    """Hash all that a request says."""
    return hashlib.sha256(f"{request.method} {request.url.path}\n".encode() + await request.body()).hexdigest()


@router.post("/jobs", status_code=201, responses=WRITING | KNOWN)
def submit_job(
    db: Db,
    caller: Submitter,
    request: Request,
    response: Response,
    body: JobRequest,
    content: Annotated[str, Depends(content_hash)],
    key: Key = None,
) -> Submitted:
    """Queue a job; 200 and the job that there is where the same one is queued, running or done."""
    job, new = submit(request, db, caller, body, submissions.Request(content, key))
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/api/jobs/{job.id}"
    return Submitted(job=answers.JobSummary.of(job), new=new)


def submit(
    request: Request, db: Database, caller: Caller, body: JobRequest, asked: submissions.Request
) -> tuple[Job, bool]:
    """Check a job and its inputs, and queue it; true if it was queued now.

    Raises UsageFault, KeyReused, or HTTPException where the service is busy.
    """
    from optimizer.service.runner import stored_spec  # it imports what runs jobs, which a dashboard can do without

    assert caller.token is not None
    known = submissions.known_job(db, caller.token, asked)
    if known is not None:
        return known, False
    try:
        spec = policy.read_job(body.job, is_admin=caller.may("admin"), files=request.app.state.files)
    except RecursionError:
        raise HTTPException(400, "job: is nested too deeply") from None
    with _preparing.take():
        inputs = prepare(spec, download=False)
    wanted = Wanted(stored_spec(spec), inputs.spec_hash, spec.priority, spec.attempts, anew=body.force)
    return submissions.submit(db, caller.token, asked, wanted)


def require_own(db: Database, caller: Caller, job_id: int) -> None:
    """Refuse what is done to another's job. Raises HTTPException, or NotFound."""
    job = jobs.get(db, job_id)
    if not may_steer(db, caller, job.id):
        raise HTTPException(403, f"job {job_id} was not submitted with the token {caller.name}; that takes an admin")


def may_steer(db: Database, caller: Caller, job_id: int) -> bool:
    """Whether the caller may cancel and resume a job: an admin every one, others their own."""
    if caller.token is None or not caller.may("submit"):
        return False
    return caller.may("admin") or submissions.is_owner(db, caller.token, job_id)


@router.post("/jobs/{job_id}/cancel", responses=WRITING)
def cancel_job(db: Db, caller: Submitter, job_id: JobId) -> answers.JobSummary:
    """Stop a waiting or running job; its measurements stay, and it can be resumed. Cancelled twice is cancelled."""
    require_own(db, caller, job_id)
    return answers.JobSummary.of(jobs.cancel(db, job_id, f"cancelled with the token {caller.name}"))


@router.post("/jobs/{job_id}/resume", responses=WRITING)
def resume_job(db: Db, caller: Submitter, job_id: JobId) -> answers.JobSummary:
    """Queue a failed or cancelled job again; it goes on where it stopped."""
    require_own(db, caller, job_id)
    return answers.JobSummary.of(jobs.resume(db, job_id, read_spec(jobs.get(db, job_id)).attempts))


@router.put("/jobs/{job_id}/priority", responses=WRITING)
def change_priority(db: Db, caller: Submitter, job_id: JobId, body: PriorityRequest) -> answers.JobSummary:
    """Change the priority of a job that has not ended."""
    require_own(db, caller, job_id)
    if body.priority > policy.HIGHEST_PRIORITY and not caller.may("admin"):
        raise HTTPException(403, f"a priority above {policy.HIGHEST_PRIORITY} takes the role admin")
    return answers.JobSummary.of(jobs.prioritize(db, job_id, body.priority))
