"""Pages that write: submit a job file, cancel and resume a job. A form holds a secret of its session."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any
from urllib.parse import parse_qs

import yaml
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from optimizer.dashboard import control
from optimizer.dashboard.access import Caller, Gate
from optimizer.dashboard.api import Db, JobId
from optimizer.dashboard.control import JobRequest, Submitter
from optimizer.dashboard.html import page
from optimizer.errors import UsageFault
from optimizer.job.loading import parse_yaml
from storage.queue import submissions
from workers.errors import WorkersError

router = APIRouter(include_in_schema=False)

DEEPEST = 20
OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)

EXAMPLE = """\
model:
  path: llava-12
task: easy-vqa
constraint:
  max_accuracy_drop: 0.01
"""


async def sent_form(request: Request, caller: Submitter) -> dict[str, str]:
    """Read a form's fields. Raises HTTPException where it was not sent from a page of the caller's session."""
    try:
        fields = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=10)
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
    gate: Gate = request.app.state.gate
    form = {name: values[0] for name, values in fields.items()}
    if not gate.proves_session(caller, form.get("secret", "")):
        raise HTTPException(403, "the form is not of this session; load its page again")
    return form


Form = Annotated[dict[str, str], Depends(sent_form)]


@router.get("/submit")
def show_form(request: Request, caller: Submitter) -> Response:
    """Return the page with the form for a job file."""
    return _form(request, caller, EXAMPLE)


def _form(request: Request, caller: Caller, text: str, problem: str = "", code: int = 200) -> Response:
    gate: Gate = request.app.state.gate
    return page(request, "submit.html", code, text=text, problem=problem, secret=gate.form_secret(caller))


@router.post("/submit")
async def take_job(request: Request, db: Db, caller: Submitter, form: Form) -> Response:
    """Queue the job of the form and show it, or say in the form what is wrong."""
    return await run_in_threadpool(_submit, request, db, caller, form)


def _submit(request: Request, db: Db, caller: Caller, form: dict[str, str]) -> Response:
    text = form.get("job", "")
    content = hashlib.sha256(text.encode()).hexdigest()
    try:
        body = JobRequest(job=_plain(text), force="force" in form)
        job, _ = control.submit(request, db, caller, body, submissions.Request(content))
    except (UsageFault, WorkersError) as fault:
        return _form(request, caller, text, str(fault), 400)
    except HTTPException as refused:
        return _form(request, caller, text, str(refused.detail), refused.status_code)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _plain(text: str) -> dict[str, Any]:
    """Read YAML whose reading takes no longer than its length says. Raises UsageFault for aliases and deep nesting.

    An alias makes a small text stand for a large document, and the time that PyYAML takes grows with the square of the
    nesting.
    """
    depth = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > DEEPEST:
                raise UsageFault("job: is nested too deeply")
            if isinstance(token, yaml.AliasToken):
                raise UsageFault("job: YAML aliases (*name) are not taken here; write the values out")
    except yaml.YAMLError:
        pass  # reported by what reads it, with line and column
    return parse_yaml(text, "job")


@router.post("/jobs/{job_id}/cancel")
def cancel(db: Db, caller: Submitter, form: Form, job_id: JobId) -> Response:
    """Cancel a job and show it."""
    control.cancel_job(db, caller, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


@router.post("/jobs/{job_id}/resume")
def resume(db: Db, caller: Submitter, form: Form, job_id: JobId) -> Response:
    """Resume a job and show it."""
    control.resume_job(db, caller, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)
