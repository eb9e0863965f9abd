"""What reports and the dashboard read, on both engines."""

from __future__ import annotations

import time
from typing import Any

import pytest
from storage_builders import Scene, figures, record, record_failure, scene, task

from storage.database import Database
from storage.queue import leases
from storage.records import evaluations, measurements, overview, plans
from storage.records.evaluations import EvaluationRecord
from storage.records.measurements import ProfileRecord, Redundancy

NOBODY = 1_000_000_000
"""An id that nothing has: on PostgreSQL ids go on from test to test, and small ones are taken sooner or later."""


def scored(db: Database, at: Scene, plan: str, scores: list[float], **more: Any) -> EvaluationRecord:
    return record(db, at.job, **at.samples, plan=plan, scores=scores, result=more)


def measure(db: Database, at: Scene, calibration: str, value: float, name: str = "cosine_distance") -> None:
    measurements.record_redundancy(
        db, at.job, model_id=at.model_id, task_id=at.task_id, calibration_hash=calibration,
        measurements=[Redundancy(0, "vision", name, value, None, 9)],
    )  # fmt: skip


def test_evaluations_in_their_order_without_scores(db: Database) -> None:
    at = scene(db)
    first = scored(db, at, "RRRR", [1.0, 0.0], layer_executions=8)
    scored(db, at, "RSRR", [1.0, 0.5, 0.0])
    record_failure(db, at.job, **at.samples, plan="SSRR", reason="NaN")
    found = evaluations.summaries(db, at.job.id)
    assert [(row.plan, row.n_samples, row.accuracy, row.failure) for row in found] == [
        ("RRRR", 2, 0.5, None),
        ("RSRR", 3, 0.5, None),
        ("SSRR", 1, None, "NaN"),
    ]
    assert found[0].layer_executions == 8
    assert evaluations.sample_scores(db, first.id) == (1.0, 0.0)
    assert evaluations.sample_scores(db, NOBODY) == ()


def test_latency_profile_of_the_job(db: Database) -> None:
    at = scene(db)
    assert measurements.profile_of_job(db, at.job.id) is None
    profile = ProfileRecord(
        model_id=at.model_id, task_id=at.task_id, device="cpu: test, 1 thread", workload="batch 1", prompt_tokens=7,
        dense_latency_seconds=0.5, layer_seconds={"R": (0.1, 0.2)}, relative_error=0.01,
    )  # fmt: skip
    measurements.record_profile(db, at.job, profile)
    found = measurements.profile_of_job(db, at.job.id)
    assert found is not None
    assert (found.device, found.workload, found.layer_seconds) == ("cpu: test, 1 thread", "batch 1", {"R": (0.1, 0.2)})


def test_redundancy_is_the_job_s_own_or_else_the_latest(db: Database) -> None:
    first, second = scene(db, "driver-1"), scene(db, "driver-2")
    measure(db, first, "as before", 0.25)
    measure(db, first, "as before", 1.0, name="measured")
    measure(db, second, "with other versions", 0.75)
    read = [
        [each.value for each in measurements.redundancy_of_job(db, job_id, first.model_id, first.task_id)]
        for job_id in (first.job.id, second.job.id, NOBODY)
    ]
    assert read == [[0.25], [0.75], [0.75]]


def test_redundancy_of_an_ended_job_is_none_that_was_measured_later(db: Database) -> None:
    first, user, later = (scene(db, f"driver-{number}") for number in (1, 2, 3))
    measure(db, first, "as before", 0.25)
    leases.finish(db, user.job)
    time.sleep(0.01)
    measure(db, later, "with other versions", 0.75)
    (found,) = measurements.redundancy_of_job(db, user.job.id, user.model_id, user.task_id)
    assert found.value == 0.25


def test_jobs_like_another(db: Database) -> None:
    alike, other = scene(db, "driver-1"), scene(db, "driver-2")
    for at in (alike, other):
        scored(db, at, "RRRR", [1.0])
    assert overview.jobs_like(db, other.job.id, other.model_id, other.task_id) == []  # it has not ended
    leases.finish(db, alike.job)
    assert overview.jobs_like(db, other.job.id, other.model_id, other.task_id) == [alike.job.id]
    assert overview.jobs_like(db, alike.job.id, other.model_id, other.task_id) == []
    assert overview.jobs_like(db, other.job.id, other.model_id, task(db, task_hash="d2")) == []


def test_models_tasks_and_devices_with_their_plans(db: Database) -> None:
    at = scene(db)
    plans.publish(db, at.job, group=at.group, figures=[figures("RSRR"), figures("RRSR")])
    other = task(db, task_hash="d2")
    assert [(found.name, found.plans) for found in overview.models(db)] == [("models/tiny", 2)]
    assert [(found.id, found.name, found.plans) for found in overview.tasks(db)] == [
        (other, "easy-vqa", 0),
        (at.task_id, "easy-vqa", 2),
    ]
    assert overview.devices(db) == ["cpu: test, 1 thread"]


@pytest.mark.parametrize("read", [overview.models, overview.tasks, overview.devices])
def test_empty_database(db: Database, read: Any) -> None:
    assert read(db) == []
