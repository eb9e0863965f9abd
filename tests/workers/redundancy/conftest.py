from __future__ import annotations

from dataclasses import replace

import pytest

from workers.tasks import Task


@pytest.fixture(scope="session")
def few(small_task: Task) -> Task:
    """Nine questions about four images."""
    return replace(small_task, calibration=small_task.calibration[:36:4])


@pytest.fixture(scope="session")
def captioned(few: Task) -> Task:
    """Four of them, answered in up to five tokens."""
    answer = few.spec.answer.model_copy(update={"kind": "short", "max_new_tokens": 5})
    spec = few.spec.model_copy(update={"answer": answer})
    return replace(few, spec=spec, calibration=few.calibration[:4])
