"""Small builders for the tests of storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.orm import Session

from storage.database import Database
from storage.pareto import Group
from storage.queue import jobs, leases
from storage.queue.jobs import Job
from storage.records import evaluations, lookup
from storage.records.engine_latencies import EngineLatency
from storage.records.evaluations import EvaluationKey, EvaluationRecord, EvaluationResult
from storage.records.lookup import ModelRecord, TaskRecord
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
    def group(self) -> Group:
        return Group(self.model_id, self.task_id, self.device_id, self.workload)

    @property
    def samples(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "task_id": self.task_id, "split": "search", "split_hash": "s1"}


def claimed(db: Database, owner: str = "driver-1", lease_seconds: float = 60, **spec: Any) -> Job:
    """Submit a job and claim it."""
    submitted = jobs.submit(db, dict(spec), "hash")
    job = leases.claim(db, owner, lease_seconds, submitted.id)
    assert job is not None
    return job


def model(db: Database, name: str = "models/tiny", fingerprint: str = "f1e2d3c4") -> int:
    return lookup.ensure_model(
        db, ModelRecord(name=name, fingerprint=fingerprint, family="llava", num_layers=4, parameters=10**9)
    )


def task_record(name: str = "easy-vqa", task_hash: str = "d1", **sizes: int) -> TaskRecord:
    sizes = {"calibration_size": 1, "search_size": 2, "held_out_size": 3} | sizes
    return TaskRecord(name=name, task_hash=task_hash, split_seed=0, **sizes)


def task(db: Database, name: str = "easy-vqa", task_hash: str = "d1") -> int:
    return lookup.ensure_task(db, task_record(name, task_hash))


def scene(db: Database, owner: str = "driver-1") -> Scene:
    return Scene(claimed(db, owner), model(db), task(db), lookup.ensure_device(db, "cpu: test, 1 thread"))


def record(
    db: Database | Session,
    job: Job,
    *,
    plan: str,
    scores: Sequence[float],
    result: dict[str, Any] | None = None,
    **key: Any,
) -> EvaluationRecord:
    """Record what a plan scored on the first samples of a split."""
    named = EvaluationKey(plan=plan, **{"n_samples": len(scores)} | key)
    return evaluations.record(db, job, named, EvaluationResult(scores=scores, **{"seconds": 1.0} | (result or {})))


def record_failure(
    db: Database, job: Job, *, plan: str, reason: str, n_samples: int = 1, **key: Any
) -> EvaluationRecord:
    return evaluations.record_failure(db, job, EvaluationKey(plan=plan, n_samples=n_samples, **key), reason)


def figures(plan: str, accuracy: float = 0.9, speedup: float = 1.5, **changes: Any) -> PlanFigures:
    """Plausible figures of a plan against a dense model at 0.95 and one second."""
    base = PlanFigures(
        plan=plan,
        n_samples=200,
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 0.02),
        accuracy_high=min(1.0, accuracy + 0.02),
        dense_accuracy=0.95,
        difference=accuracy - 0.95,
        difference_low=accuracy - 0.97,
        difference_high=accuracy - 0.93,
        confidence=0.95,
        dense_latency_seconds=1.0,
        latency_seconds=1.0 / speedup,
        speedup=speedup,
        speedup_low=speedup * 0.9,
        speedup_high=speedup * 1.1,
        dense_kv_cache_bytes=4096,
        kv_cache_bytes=2048,
        layers_touched=sum(letter != "R" for letter in plan),
    )
    return replace(base, **changes)


def engine_latency(speedup: float, **changes: Any) -> EngineLatency:
    """Plausible figures of an engine against a dense request of 0.1 seconds."""
    base = EngineLatency(
        engine="vllm",
        version="0.32.0",
        dtype="float32",
        concurrency=1,
        rounds=20,
        speedup=speedup,
        speedup_low=0.95 * speedup,
        speedup_high=1.05 * speedup,
        first_token_seconds=0.05 / speedup,
        dense_first_token_seconds=0.05,
        seconds_per_token=0.01 / speedup,
        dense_seconds_per_token=0.01,
        latency_seconds=0.1 / speedup,
        dense_latency_seconds=0.1,
        requests_per_second=10 * speedup,
        dense_requests_per_second=10.0,
        kv_cache_bytes=1 << 20,
        kv_cache_tokens=2048,
        dense_kv_cache_tokens=1024,
    )
    return replace(base, **changes)
