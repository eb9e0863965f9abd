"""Every answer of the API is as its OpenAPI description says, for inputs that schemathesis makes up, for every role."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings

from optimizer.dashboard import access
from optimizer.dashboard.app import create_app
from storage.database import Database
from storage.queue import jobs

READING = (
    "/api/jobs",
    "/api/jobs/{job_id}",
    "/api/jobs/{job_id}/evaluations",
    "/api/plans",
    "/api/plans/{plan_id}",
    "/api/models",
    "/api/tasks",
    "/api/devices",
)
WRITING = (
    ("/api/jobs", "POST"),
    ("/api/jobs/{job_id}/cancel", "POST"),
    ("/api/jobs/{job_id}/resume", "POST"),
    ("/api/jobs/{job_id}/priority", "PUT"),
    ("/api/plans/{plan_id}/exports", "POST"),
    ("/api/plans/{plan_id}/exports/{format_name}", "GET"),
    ("/api/plans/{plan_id}/exports/{format_name}/files/{file}", "GET"),
)


def check_operation(app: FastAPI, path: str, method: str, examples: int, token: str | None = None) -> set[int]:
    """The statuses that made-up requests were answered with; no answer may be other than described."""
    import schemathesis  # here, because every process of the tests imports this file
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    # A job, a format, a priority or two filters can be wrong in ways that no schema says; the answer is 400 or 403.
    beyond = [CHECKS.get_one("positive_data_acceptance")] if method != "GET" or path == "/api/plans" else []

    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=_headers(token))
    statuses = set()

    @given(case=schema[path][method].as_strategy())
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        answer = case.call_and_validate(headers=_headers(token), excluded_checks=beyond)
        statuses.add(answer.status_code)

    check()
    return statuses


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


@pytest.mark.slow
@pytest.mark.parametrize("path", READING)
def test_answers_are_as_described(filled: Database, path: str) -> None:
    check_operation(create_app(filled), path, "GET", 60)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["read", "submit", "admin"])
def test_what_writes_answers_as_described(service: Any, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "WRITES_PER_MINUTE", 10**6)
    monkeypatch.setattr(access, "READS_PER_MINUTE", 10**6)
    service.app.state.gate.__init__(None, service.db)
    before = {job.id: job.state for job in jobs.list_jobs(service.db)}
    for path, method in WRITING:
        statuses = check_operation(service.app, path, method, 25, service.tokens[role])
        assert not any(status >= 500 for status in statuses), (path, statuses)
    after = {job.id: job.state for job in jobs.list_jobs(service.db)}
    if role != "admin":  # who steers the jobs of others
        assert after == before


def test_no_operation_is_left_out(filled: Database, service: Any) -> None:
    assert tuple(create_app(filled).openapi()["paths"]) == READING
    described = service.app.openapi()["paths"]
    operations = {(path, method.upper()) for path, methods in described.items() for method in methods}
    assert operations == {*WRITING, *((path, "GET") for path in READING)}
