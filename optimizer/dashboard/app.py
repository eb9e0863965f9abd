"""The application: pages and API over one database, behind the gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from optimizer.dashboard import api, control, exporting, forms, html
from optimizer.dashboard.access import Gate, hosts_for
from optimizer.dashboard.limits import BodyLimit
from optimizer.errors import UsageFault
from storage.database import Database
from storage.errors import DatabaseError, InvalidTransition, InvalidValue, KeyReused, NotFound
from workers.errors import WorkersError
from workers.text import one_line

LONGEST_DETAIL = 1000
STATUS_OF: dict[type[Exception], int] = {
    NotFound: 404,
    InvalidTransition: 409,
    KeyReused: 409,
    InvalidValue: 400,
    UsageFault: 400,
    WorkersError: 400,
}
"""What the errors of what a request asks for are answered with."""

DESCRIPTION = (
    "Jobs, published plans, models, tasks and devices of a skipplan database. "
    "Where a token is asked for, send it as `Authorization: Bearer TOKEN`."
)


@dataclass(frozen=True)
class Writing:
    """Configure the API that writes: the directory whose files jobs may name, and the one that keeps exports."""

    files: Path | None
    exports: Path


def create_app(
    db: Database, *, host: str = "127.0.0.1", token: str | None = None, writing: Writing | None = None
) -> FastAPI:
    """Return the dashboard over ``db``; with a ``token`` nothing is shown without it.

    With ``writing``, jobs can be submitted and steered, and nothing is shown without a token of the database or the
    ``token``, which only reads.
    """
    gate = Gate(token, None if writing is None else db)
    app = FastAPI(
        title="skipplan",
        version=version("skipplan"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        dependencies=[] if gate.is_open else [Depends(HTTPBearer(auto_error=False, description="A token."))],
    )
    app.state.database, app.state.gate, app.state.reports = db, gate, html.Reports()
    app.add_middleware(BodyLimit)
    app.middleware("http")(gate.guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts_for(host, is_open=gate.is_open))
    app.include_router(api.router)
    if writing is not None:
        app.state.files, app.state.exports = writing.files, writing.exports
        for each in (control, exporting, forms):
            app.include_router(each.router)
    app.include_router(html.router)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind, status in STATUS_OF.items():
        app.add_exception_handler(kind, partial(_explained, status))
    app.add_exception_handler(DatabaseError, _unavailable)
    return app


def _answer(request: Request, status: int, detail: str) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": detail}, status)
    return html.show_problem(request, status, detail)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    answer = _answer(request, error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [{"loc": each["loc"], "msg": each["msg"], "type": each["type"]} for each in error.errors()]
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": problems}, 422)
    detail = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in problems)
    return html.show_problem(request, 422, detail)


def _explained(status: int, request: Request, error: Exception) -> Response:
    return _answer(request, status, one_line(error)[:LONGEST_DETAIL])


def _unavailable(request: Request, error: Exception) -> Response:
    return _answer(request, 503, f"the database cannot be read: {one_line(error)}")
