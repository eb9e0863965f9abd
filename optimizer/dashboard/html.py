"""The pages: rendered here, readable without a script; a small one keeps progress current."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from optimizer.dashboard import answers, api, control
from optimizer.dashboard.access import COOKIE, SESSION_SECONDS, Caller, Gate
from optimizer.dashboard.api import Db, JobId
from optimizer.reports import formatting
from optimizer.reports.data import collect
from optimizer.reports.html import job_page, plotly_script, render, search_curves
from storage.database import Database
from storage.errors import NotFound
from storage.queue import jobs
from storage.queue.jobs import Job
from storage.records import overview
from storage.records.plans import PlanQuery, Sort
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import Action

router = APIRouter(include_in_schema=False)
JOBS_SHOWN = 100


class Reports:
    """Written reports, the last few of them, as long as neither their job nor the jobs beside it have changed."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._written: dict[tuple[object, ...], str] = {}

    def get(self, db: Database, job: Job) -> str:
        """Return the job's report; that of an unfinished job is written anew."""
        key = (job.id, job.state, job.attempt, job.finished_at, *jobs.count(db).items())
        if key not in self._written:
            report = collect(db, job.id)
            page = render(job_page(report, search_curves(db, report)), scripts="/static/")
            if not job.is_finished:
                return page
            while len(self._written) >= self._most:
                self._written.pop(next(iter(self._written)))
            self._written[key] = page
        return self._written[key]


@cache
def _environment() -> Environment:
    def source(name: str) -> str:
        return (files("optimizer.dashboard") / "pages" / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(source), autoescape=select_autoescape(default=True), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["formatting"] = formatting
    environment.globals["actions"] = tuple(Action)
    environment.globals["no_compensation"] = NO_COMPENSATION
    return environment


def page(request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
    """Return a page from its template."""
    caller: Caller | None = getattr(request.state, "caller", None)
    may_submit = caller is not None and caller.token is not None and caller.may("submit")
    html = _environment().get_template(template).render(path=request.url.path, may_submit=may_submit, **values)
    return HTMLResponse(html, code)


@router.get("/")
def show_jobs(request: Request, db: Db) -> HTMLResponse:
    """All jobs, with live progress."""
    listed = [answers.JobSummary.of(job) for job in jobs.list_jobs(db, (), JOBS_SHOWN)]
    return page(request, "jobs.html", jobs=listed, counted=jobs.count(db), shown=JOBS_SHOWN)


@router.get("/jobs/{job_id}")
def show_job(request: Request, db: Db, job_id: JobId) -> HTMLResponse:
    """One job: state, progress, plans, history, and for those who may the means to stop it."""
    caller: Caller = request.state.caller
    secret = request.app.state.gate.form_secret(caller) if control.may_steer(db, caller, job_id) else ""
    return page(request, "job.html", job=api.show_job(db, job_id), secret=secret)


@router.get("/jobs/{job_id}/report")
def show_report(request: Request, db: Db, job_id: JobId) -> HTMLResponse:
    """Return a job's report; `skipplan report` writes the same page as one file."""
    reports: Reports = request.app.state.reports
    return HTMLResponse(reports.get(db, jobs.get(db, job_id)))


class PlanForm(BaseModel):
    """The form above the list of plans; empty fields do not filter."""

    model: str = ""
    task: str = ""
    device: str = ""
    max_points: str = Field("", max_length=20)
    min_speedup: str = Field("", max_length=20)
    mode: Literal["standalone", "lossless"] = "standalone"
    front: bool = False
    all_versions: bool = False
    sort: Sort = "speedup"

    def query(self) -> PlanQuery:
        """Return the query of the filled-in form. Raises HTTPException naming a field that is no number."""
        return PlanQuery(
            self.model or None,
            self.task or None,
            device=self.device or None,
            max_accuracy_drop=_share(self.max_points),
            min_speedup=_number("smallest speed-up", self.min_speedup),
            mode=self.mode,
            on_front=self.front,
            sort=self.sort,
            limit=200,
        )


@router.get("/plans")
def show_plans(request: Request, db: Db, chosen: Annotated[PlanForm, Query()]) -> HTMLResponse:
    """Return published plans, with a form to filter them."""
    problem, code, found = "", 200, []
    try:
        found = api.list_plans(db, chosen.query(), chosen.all_versions)
    except HTTPException as error:
        problem, code = str(error.detail), error.status_code
    except NotFound as error:
        problem, code = str(error), 404
    return page(
        request,
        "plans.html",
        code,
        plans=found,
        problem=problem,
        chosen=chosen.model_dump(),
        models=sorted({each.name for each in overview.models(db)}),
        tasks=sorted({each.name for each in overview.tasks(db)}),
        devices=overview.devices(db),
    )


def _share(points: str) -> float | None:
    number = _number("largest loss", points)
    return None if number is None else number / 100


def _number(field: str, given: str) -> float | None:
    """Return a number from a form; empty is none. Raises HTTPException naming the field."""
    if not given.strip():
        return None
    try:
        value = float(given.replace(",", "."))
    except ValueError:
        raise HTTPException(400, f"{field}: {given!r} is no number") from None
    if not 0 <= value <= 1000:
        raise HTTPException(400, f"{field}: must lie between 0 and 1000")
    return value


@router.get("/models")
def show_models(request: Request, db: Db) -> HTMLResponse:
    """Models and tasks."""
    return page(request, "models.html", models=overview.models(db), tasks=overview.tasks(db))


@router.get("/docs")
def show_interface(request: Request) -> HTMLResponse:
    """Return the description of the API as a page; programs read the same in /openapi.json."""
    document = request.app.openapi()
    return page(request, "interface.html", document=document, schemas=document["components"]["schemas"])


@router.get("/login")
def ask_for_token(request: Request) -> Response:
    """Return the page that asks for the token."""
    if request.state.caller is not None:
        return RedirectResponse("/", 303)
    return page(request, "login.html", problem="")


@router.post("/login")
async def take_token(request: Request) -> Response:
    """Set the cookie that lets this browser in."""
    gate: Gate = request.app.state.gate
    given = parse_qs((await request.body()).decode("utf-8", "replace")).get("token", [""])[0]
    cookie = await run_in_threadpool(gate.accept, given.strip())
    if cookie is None:
        gate.count_failure(request)
        return page(request, "login.html", 401, problem="That is not the token.")
    answer = RedirectResponse("/", 303)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, cookie, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=secure)
    return answer


STATIC = {
    "plotly.js": "text/javascript",
    "report.js": "text/javascript",
    "live.js": "text/javascript",
    "report.css": "text/css",
    "dashboard.css": "text/css",
}


@router.get("/static/{name}")
def show_static(name: str) -> Response:
    """Style and scripts, all from this machine."""
    if name not in STATIC:
        raise HTTPException(404, f"there is no file {name}")
    return PlainTextResponse(_static(name), media_type=STATIC[name], headers={"Cache-Control": "private, max-age=3600"})


@cache
def _static(name: str) -> str:
    if name == "plotly.js":
        return plotly_script()
    package, folder = ("reports", "page") if name.startswith("report.") else ("dashboard", "pages")
    return (files(f"optimizer.{package}") / folder / name).read_text(encoding="utf-8")


def show_problem(request: Request, status: int, detail: str) -> Response:
    """Return an error as a page, or as JSON for the API."""
    return page(request, "problem.html", status, status=status, detail=detail)
