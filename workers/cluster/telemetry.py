"""Report on a worker pool: log lines, and counters in Ray's own metrics.

Ray serves its metrics to Prometheus where the cluster was started with ``ray[default]``; elsewhere they cost nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.util.metrics import Counter, Gauge

logger = logging.getLogger(__name__)


def log(event: str, **fields: Any) -> None:
    """Log one event of the pool, with its fields beside it in the line."""
    logger.info(event, extra={"fields": fields})


class Telemetry:
    """Ray metrics of one worker pool."""

    def __init__(self) -> None:
        self._requests = Counter("skipplan_requests", "Requests answered by workers.", ("kind", "outcome"))
        self._retries = Counter("skipplan_retries", "Requests given to another worker after theirs was lost.")
        self._lost = Counter("skipplan_workers_lost", "Workers that died, hung or could not load the model.")
        self._workers = Gauge("skipplan_workers", "Workers that hold the model.")

    def answered(self, kind: str, outcome: str) -> None:
        """Count a request that ended; ``outcome`` is ``"done"`` or ``"failed"``."""
        self._requests.inc(1, {"kind": kind, "outcome": outcome})

    def retried(self, kind: str, reason: str) -> None:
        """Count and log a request that goes to another worker."""
        self._retries.inc(1)
        log("request_retried", kind=kind, reason=reason)

    def lost(self, worker: int, reason: str) -> None:
        """Count and log a worker that died or was given up."""
        self._lost.inc(1)
        log("worker_lost", worker=worker, reason=reason)

    def count(self, ready: int) -> None:
        """Set the number of workers that hold the model."""
        self._workers.set(ready)
