"""Every answer of the API is as its OpenAPI description says, for inputs that schemathesis makes up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from optimizer.dashboard.app import create_app
from storage.database import Database

OPERATIONS = (
    "/api/jobs",
    "/api/jobs/{job_id}",
    "/api/plans",
    "/api/plans/{plan_id}",
    "/api/models",
    "/api/tasks",
    "/api/devices",
)


@pytest.mark.slow
@pytest.mark.parametrize("path", OPERATIONS)
def test_answers_are_as_described(filled: Database, path: str) -> None:
    import schemathesis  # here, because every process of the tests imports this file

    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(filled))

    @given(case=schema[path]["GET"].as_strategy())
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        case.call_and_validate()

    check()


def test_no_operation_is_left_out(filled: Database) -> None:
    assert tuple(create_app(filled).openapi()["paths"]) == OPERATIONS
