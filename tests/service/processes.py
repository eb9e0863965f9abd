"""Serving processes, their workers, and tiny jobs for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer import service
from optimizer.inputs import prepare
from optimizer.job import JobSpec
from storage import evaluations, jobs, stages
from storage.database import Database
from storage.jobs import Job

PROJECT = Path(__file__).resolve().parents[2]


def tiny_job(model: Path, number: int, **cluster: Any) -> JobSpec:
    """A job that ends the same on any machine: no measured time steers its search.

    Jobs of different numbers have search splits of different sizes, so that none can take over another's evaluations.
    """
    return JobSpec.model_validate(
        {
            "model": {"path": str(model), "device": "cpu"},
            "task": "easy-vqa",
            "constraint": {"max_accuracy_drop": 1.0},
            "search": {
                "evaluations": 16,
                "batch": 4,
                "finalists": 2,
                "latency": "layers",
                "seeds": "none",
                "warm_start": False,
                "seed": number,
            },
            "splits": {"calibration": 4, "search": 12 + number % 64, "held_out": 24, "unit": "samples"},
            "workload": {"new_tokens": 1},
            "latency_seconds": 0.2,
            "latency_precision": 0.5,
            "attempts": 1000,
            "cluster": {"workers": 1 + number % 2, "cpus_per_worker": 0.5, "max_attempts": 100, **cluster},
        }
    )


def submit(db: Database, spec: JobSpec) -> Job:
    """Queue a job, even if there is one like it."""
    job, _ = service.submit(db, prepare(spec), anew=True)
    return job


@dataclass
class Serving:
    """A ``skipplan serve`` process; what it logs goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, url: str, log: Path, *options: str) -> Serving:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SKIPPLAN_")}
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "optimizer.cli.main", "serve", "--log-format", "json", *options],
                env={
                    **inherited,
                    "PYTHONPATH": str(PROJECT),
                    "SKIPPLAN_DATABASE": url,
                    # Locks of the device lie here: workers that are none of this test's must not hold up its own.
                    "TMPDIR": str(log.parent),
                    "RAY_TMPDIR": "/tmp",  # paths of sockets must be short
                },
                stdout=stream,
                stderr=stream,
                cwd=log.parent,
            )
        return cls(process, log)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def workers(self) -> list[int]:
        """The processes that hold its models."""
        return [process for process in descendants(self.process.pid) if b"ray::Worker" in command_line(process)]

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory ends."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for an orderly end."""
        self.process.terminate()
        return self.process.wait(120)


def command_line(process: int) -> bytes:
    """The arguments (or, for Ray's workers, the title) of a process; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def descendants(process: int) -> Iterator[int]:
    """Children, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            number = int(path.name)
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(number)
    waiting = [process]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            yield child


def send_kill(process: int) -> bool:
    """SIGKILL; whether there was such a process."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        return True
    return False


def wait_until_done(db: Database, numbers: list[int], serving: list[Serving], seconds: float) -> None:
    """Wait for all jobs to end. Raises AssertionError when a serving process ended, or time is up."""
    deadline = time.monotonic() + seconds
    while not all(jobs.get(db, number).is_finished for number in numbers):
        for each in serving:
            assert each.alive, each.log.read_text()[-3000:]
        assert time.monotonic() < deadline, [(number, jobs.get(db, number).state) for number in numbers]
        time.sleep(0.2)


def front(db: Database, job: int) -> list[tuple[str, float, float]]:
    """The search's front as the job recorded it: plan, predicted time, drop, over completely evaluated plans."""
    from pydantic import TypeAdapter

    from optimizer.search.outcome import SearchOutcome

    outcome = TypeAdapter(SearchOutcome).validate_python(stages.stages(db, job)["search"].payload["value"])
    return [(each.plan, each.latency_ratio, each.drop) for each in outcome.front()]


def measured(db: Database, job: int) -> dict[tuple[str, str, int], tuple[float, ...]]:
    """Scores by plan, split and rung. Fails on a repeated or a failed evaluation."""
    found: dict[tuple[str, str, int], tuple[float, ...]] = {}
    for each in evaluations.for_job(db, job):
        key = (each.plan, each.split, each.rung)
        assert key not in found, f"{key} is there twice"
        assert each.failure is None, each.failure
        found[key] = each.scores
    return found
