"""Small builders for the tests of storage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from storage.database import Database
from storage.queue import jobs
from storage.queue.jobs import Job
from storage.records import measurements
from storage.records.plans import PlanFigures


@dataclass(frozen=True)
class Scene:
    """A claimed job with a model, task and device to write about."""

    job: Job
    model_id: int
    task_id: int
    device_id: int
    workload: str = "batch=1 new=4"

    @property
    def group(self) -> dict[str, Any]:
        return {
            "model_id": self.model_id,
            "task_id": self.task_id,
            "device_id": self.device_id,
            "workload": self.workload,
        }

    @property
    def samples(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "task_id": self.task_id, "split": "search", "split_hash": "s1", "rung": 0}


def claimed(db: Database, owner: str = "driver-1", lease_seconds: float = 60, **spec: Any) -> Job:
    """Submit a job and claim it."""
    submitted = jobs.submit(db, dict(spec), "hash")
    job = jobs.claim(db, owner, lease_seconds, submitted.id)
    assert job is not None
    return job


def model(db: Database, name: str = "models/tiny", fingerprint: str = "f1e2d3c4") -> int:
    return measurements.ensure_model(
        db, name=name, fingerprint=fingerprint, family="llava", num_layers=4, parameters=10**9
    )


def task(db: Database, name: str = "easy-vqa", data_hash: str = "d1") -> int:
    return measurements.ensure_task(
        db, name=name, data_hash=data_hash, split_seed=0, calibration_size=1, search_size=2, held_out_size=3
    )


def scene(db: Database, owner: str = "driver-1") -> Scene:
    return Scene(claimed(db, owner), model(db), task(db), measurements.ensure_device(db, name="cpu: test, 1 thread"))


def figures(plan: str, accuracy: float = 0.9, speedup: float = 1.5, **changes: Any) -> PlanFigures:
    """Plausible figures of a plan against a dense model at 0.95 and one second."""
    base = PlanFigures(
        plan=plan,
        n=200,
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 0.02),
        accuracy_high=min(1.0, accuracy + 0.02),
        dense_accuracy=0.95,
        difference=accuracy - 0.95,
        difference_low=accuracy - 0.97,
        difference_high=accuracy - 0.93,
        confidence=0.95,
        dense_seconds=1.0,
        seconds=1.0 / speedup,
        speedup=speedup,
        speedup_low=speedup * 0.9,
        speedup_high=speedup * 1.1,
        dense_kv_cache_bytes=4096,
        kv_cache_bytes=2048,
        layers_touched=sum(letter != "R" for letter in plan),
    )
    return replace(base, **changes)
