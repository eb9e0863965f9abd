from __future__ import annotations

from dataclasses import replace

import pytest

from workers.tasks import Task


@pytest.fixture(scope="session")
def few(small_task: Task) -> Task:
    """Nine questions about four images."""
    return replace(small_task, calibration=small_task.calibration[:36:4])
