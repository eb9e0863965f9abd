"""Documents of plans, for the tests of exports."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optimizer.exports.document import SCHEMA_VERSION, PlanDocument
from storage.records.lookup import ModelRecord, TaskRecord
from storage.records.plans import MeasuredFigures
from workers.models.checkpoint import fingerprint_checkpoint


def document(plan: str, directory: Path | None = None, **changes: Any) -> PlanDocument:
    """A plausible document; ``directory`` holds the model whose fingerprint it has."""
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "plan": plan,
        "compensation": "none",
        "model": ModelRecord(
            name="tiny",
            fingerprint="ab" * 32 if directory is None else fingerprint_checkpoint(directory),
            family="llava",
            num_layers=len(plan),
            parameters=123_456,
        ),
        "task": TaskRecord(
            name="easy-vqa", task_hash="d1", split_seed=0, calibration_size=4, search_size=8, held_out_size=16
        ),
        "device": "cpu: test, 1 thread",
        "workload": "batch=1 new=4",
        "figures": MeasuredFigures(
            n_samples=200,
            confidence=0.95,
            accuracy=0.9,
            accuracy_low=0.87,
            accuracy_high=0.93,
            dense_accuracy=0.92,
            difference=-0.02,
            difference_low=-0.04,
            difference_high=0.01,
            speedup=1.5,
            speedup_low=1.4,
            speedup_high=1.6,
            latency_seconds=0.02,
            dense_latency_seconds=0.03,
            kv_cache_bytes=2048,
            dense_kv_cache_bytes=4096,
            secondary={"difference_confidence": 0.9875},
        ),
        "origin": "measured",
        "published_at": datetime(2026, 5, 1, 12, tzinfo=UTC),
    }
    return PlanDocument(**(values | changes))


def drafting_document(plan: str, directory: Path | None = None) -> PlanDocument:
    """The document of a lossless plan."""
    figures = replace(document(plan, directory).figures, extra_bytes=1024)
    return document(plan, directory, mode="lossless", figures=figures)
