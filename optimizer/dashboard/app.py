"""The application: pages and API over one database, behind the gate."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from optimizer.dashboard import api, html
from optimizer.dashboard.access import Gate, hosts_for
from storage.database import Database
from storage.errors import DatabaseError, NotFound
from workers.text import one_line

DESCRIPTION = (
    "Jobs, published plans, models, tasks and devices of a skipplan database. Read-only. "
    "Where a token is asked for, send it as `Authorization: Bearer TOKEN`."
)


def create_app(db: Database, *, host: str = "127.0.0.1", token: str | None = None) -> FastAPI:
    """Return the dashboard over ``db``; with a ``token`` nothing is shown without it."""
    app = FastAPI(title="skipplan", version=version("skipplan"), description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.database = db
    app.state.gate = Gate(token)
    app.state.reports = html.Reports()
    app.middleware("http")(app.state.gate.guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts_for(host, token))
    app.include_router(api.router)
    app.include_router(html.router)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(NotFound, _not_found)
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


def _not_found(request: Request, error: Exception) -> Response:
    return _answer(request, 404, str(error))


def _unavailable(request: Request, error: Exception) -> Response:
    return _answer(request, 503, f"the database cannot be read: {one_line(error)}")
