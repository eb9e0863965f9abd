"""Documents of plans, for the tests of exports."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optimizer.exports.document import Figures, Interval, Model, PlanDocument, Task
from workers.models.checkpoint import fingerprint_checkpoint


def document(plan: str, directory: Path | None = None, **changes: Any) -> PlanDocument:
    """A plausible document; ``directory`` holds the model whose fingerprint it has."""
    values: dict[str, Any] = {
        "schema_version": 1,
        "plan": plan,
        "compensation": "none",
        "model": Model(
            name="tiny",
            fingerprint="ab" * 32 if directory is None else fingerprint_checkpoint(directory),
            family="llava",
            num_layers=len(plan),
            parameters=123_456,
        ),
        "task": Task(
            name="easy-vqa", data_hash="d1", split_seed=0, calibration_size=4, search_size=8, held_out_size=16
        ),
        "device": "cpu: test, 1 thread",
        "workload": "batch=1 new=4",
        "figures": Figures(
            n=200,
            confidence=0.95,
            accuracy=Interval(estimate=0.9, low=0.87, high=0.93),
            dense_accuracy=0.92,
            difference=Interval(estimate=-0.02, low=-0.04, high=0.01),
            speedup=Interval(estimate=1.5, low=1.4, high=1.6),
            seconds=0.02,
            dense_seconds=0.03,
            kv_cache_bytes=2048,
            dense_kv_cache_bytes=4096,
            secondary={"difference_confidence": 0.9875},
        ),
        "origin": "measured",
        "published_at": datetime(2026, 5, 1, 12, tzinfo=UTC),
    }
    return PlanDocument(**(values | changes))
