"""What reports and the dashboard read, on both engines."""

from __future__ import annotations

from typing import Any

import pytest
from storage_builders import Scene, figures, scene, task

from storage.database import Database
from storage.queue import jobs
from storage.records import evaluations, measurements, overview, plans
from storage.records.measurements import LatencyProfile, Redundancy

NOBODY = 1_000_000_000
"""An id that nothing has: on PostgreSQL ids go on from test to test, and small ones are taken sooner or later."""


def scored(db: Database, at: Scene, plan: str, scores: list[float], **more: Any) -> evaluations.Evaluation:
    return evaluations.record(
        db, at.job, **(at.samples | {"rung": len(scores)}), plan=plan, sample_scores=scores, seconds=1.0, **more
    )


def measure(db: Database, at: Scene, calibration: str, value: float, name: str = "cosine_distance") -> None:
    measurements.record_redundancy(
        db, at.job, model_id=at.model_id, task_id=at.task_id, calibration_hash=calibration,
        measurements=[Redundancy(0, "vision", name, value, None, 9)],
    )  # fmt: skip


def test_evaluations_in_their_order_without_scores(db: Database) -> None:
    at = scene(db)
    first = scored(db, at, "RRRR", [1.0, 0.0], layer_executions=8)
    scored(db, at, "RSRR", [1.0, 0.5, 0.0])
    evaluations.record_failure(db, at.job, **at.samples, plan="SSRR", reason="NaN")
    found = overview.evaluations(db, at.job.id)
    assert [(row.plan, row.n, row.accuracy, row.failure) for row in found] == [
        ("RRRR", 2, 0.5, None),
        ("RSRR", 3, 0.5, None),
        ("SSRR", 0, None, "NaN"),
    ]
    assert found[0].layer_executions == 8
    assert overview.sample_scores(db, first.id) == (1.0, 0.0)
    assert overview.sample_scores(db, NOBODY) == ()


def test_latency_profile_of_the_job(db: Database) -> None:
    at = scene(db)
    assert overview.latency_profile(db, at.job.id) is None
    profile = LatencyProfile(at.model_id, at.task_id, at.device_id, "batch 1", 7, 0.5, {"R": (0.1, 0.2)}, 0.01)
    measurements.record_latency(db, at.job, profile)
    found = overview.latency_profile(db, at.job.id)
    assert found is not None
    assert (found.device, found.workload, found.layer_seconds) == ("cpu: test, 1 thread", "batch 1", {"R": (0.1, 0.2)})


def test_redundancy_is_the_job_s_own_or_else_the_latest(db: Database) -> None:
    first, second = scene(db, "driver-1"), scene(db, "driver-2")
    measure(db, first, "as before", 0.25)
    measure(db, first, "as before", 1.0, name="measured")
    measure(db, second, "with other versions", 0.75)
    read = [
        [each.value for each in overview.redundancy(db, job_id, first.model_id, first.task_id)]
        for job_id in (first.job.id, second.job.id, NOBODY)
    ]
    assert read == [[0.25], [0.75], [0.75]]


def test_jobs_like_another(db: Database) -> None:
    alike, other = scene(db, "driver-1"), scene(db, "driver-2")
    for at in (alike, other):
        scored(db, at, "RRRR", [1.0])
    assert overview.jobs_like(db, other.job.id, other.model_id, other.task_id) == []  # it has not ended
    jobs.finish(db, alike.job)
    assert overview.jobs_like(db, other.job.id, other.model_id, other.task_id) == [alike.job.id]
    assert overview.jobs_like(db, alike.job.id, other.model_id, other.task_id) == []
    assert overview.jobs_like(db, other.job.id, other.model_id, task(db, data_hash="d2")) == []


def test_models_tasks_and_devices_with_their_plans(db: Database) -> None:
    at = scene(db)
    plans.publish(db, at.job, **at.group, figures=[figures("RSRR"), figures("RRSR")])
    other = task(db, data_hash="d2")
    assert [(found.name, found.plans) for found in overview.models(db)] == [("models/tiny", 2)]
    assert [(found.id, found.name, found.plans) for found in overview.tasks(db)] == [
        (other, "easy-vqa", 0),
        (at.task_id, "easy-vqa", 2),
    ]
    assert overview.devices(db) == ["cpu: test, 1 thread"]


@pytest.mark.parametrize("read", [overview.models, overview.tasks, overview.devices])
def test_empty_database(db: Database, read: Any) -> None:
    assert read(db) == []
