"""Running the command line in a process of its own, and the small job that the tests here share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
MODEL = "llava-12"

JOB = """\
model: {path: llava-12, dtype: float32}
task: easy-vqa
actions: [skip]
constraint: {max_accuracy_drop: 1.0}  # also plans that skip half of the layers: surely faster on any machine
search: {trials: 8, batch: 4, finalists: 2, rungs: [16]}
splits: {calibration: 8, search: 48, held_out: 96, unit: samples}
workload: {new_tokens: 2}
latency: {precision: 0.1, max_seconds: 2}
cluster: {workers: 2}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: str


def own_locks(directory: Path) -> dict[str, str]:
    """Environment of a process whose workers neither wait for others on this machine nor hold them up."""
    return {"TMPDIR": str(directory), "RAY_TMPDIR": "/tmp"}  # Ray's sockets need a short path


def command(
    directory: Path,
    *arguments: str,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
    shown: bool = False,
) -> Ended:
    """Run ``skipplan`` in a process of its own, in ``directory``; ``shown`` passes its errors on as they come."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SKIPPLAN_")}
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(
            [sys.executable, "-m", "optimizer.cli.main", *arguments],
            cwd=directory,
            env={**inherited, **own_locks(directory), "PYTHONPATH": str(PROJECT), **(environment or {})},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        overdue = threading.Timer(timeout, process.kill)
        overdue.start()
        assert process.stderr is not None
        errors = ""
        for line in process.stderr:
            errors += line
            if shown:
                sys.stderr.write(line)
                sys.stderr.flush()
        process.wait()
        overdue.cancel()
        output.seek(0)
        return Ended(process.returncode, output.read(), errors)


@dataclass(frozen=True)
class FinishedJob:
    """A job that ran to its end: where, and what it printed."""

    directory: Path
    job_file: Path
    result: dict[str, Any]

    @property
    def best(self) -> dict[str, Any]:
        best: dict[str, Any] = self.result["best"]
        return best

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.directory / 'skipplan.db'}"
