"""Mark samples that fail during a job: they are named in its history and left out, and too many end the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optimizer.errors import Fault
from storage.database import Database
from storage.queue import events
from storage.queue.jobs import Job
from workers.tasks import Task

KIND = "sample_failed"
MOST_SHOWN = 50
"""Samples that the end of a job names; its history holds all."""


class TooManyFailed(Fault):
    """More samples of a split failed than the job allows."""


class FailedSamples:
    """The samples of one job that failed so far, in any attempt, by split.

    At most the share ``allowed`` of a split may fail; ``note`` is given a line about each sample.
    """

    def __init__(self, db: Database, job: Job, task: Task, allowed: float, note: Callable[[str], None]) -> None:
        self._db, self._job, self._task, self._allowed, self._note = db, job, task, allowed, note
        self._reasons: dict[str, dict[str, str]] = {}
        for split, sample, reason in recorded(events.for_job(db, job.id)):
            self._reasons.setdefault(split, {})[sample] = reason

    def of(self, split: str) -> dict[str, str]:
        """Return the reasons by sample."""
        return dict(self._reasons.get(split, {}))

    def add(self, split: str, found: Mapping[str, str], size: int | None = None) -> None:
        """Mark samples of a split, or of ``size`` samples of another task.

        Raises TooManyFailed with all of them where the job does not allow so many.
        """
        known = self._reasons.setdefault(split, {})
        name = "held-out" if split == "held_out" else split
        for sample, reason in found.items():
            if sample not in known:
                known[sample] = reason
                text = f"{name} sample {sample}: {reason}"
                data = {"split": split, "sample": sample, "reason": reason}
                events.add(self._db, self._job.id, self._job.attempt, KIND, text, data)
                self._note(f"{text}; it is left out")
        share, size = self._allowed, size or len(self._task.split(split))
        if len(known) <= (max(1.0, share * size) if share else 0):
            return
        lines = [f"sample {sample}: {reason}" for sample, reason in known.items()]
        more = [f"and {len(lines) - MOST_SHOWN} more (skipplan jobs show {self._job.id})"] * (len(lines) > MOST_SHOWN)
        raise TooManyFailed(
            f"{len(known)} of {size} {name} samples failed, more than max_failed_samples {share:g}",
            [*lines[:MOST_SHOWN], *more],
        )


def recorded(history: list[events.Event]) -> list[tuple[str, str, str]]:
    """Return split, sample and reason of every sample that a job's history says failed."""
    return [(e.data["split"], e.data["sample"], e.data["reason"]) for e in history if e.kind == KIND]
