"""What has processes of its own, in this one: a worker that remembers what it was asked for, and a loaded export."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optimizer.exports import fresh_process, verification
from optimizer.job.inputs import prepare
from optimizer.job.spec import JobSpec
from optimizer.stages.context import JobContext
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs
from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.device import lock
from workers.messages import ModelSource, Reply, Request
from workers.tasks import Task

ONE_AT_A_TIME = threading.Lock()
"""A worker answers one request after another, also those of stages that run together."""


class OneWorker:
    def __init__(self, model: str, task: Task) -> None:
        self.handler = Handler.load(
            ModelSource(model, device="cpu", dtype="float32"), task, WorkerSettings(0, batch_size=8)
        )
        self.info = (self.handler.info,)
        self.fingerprint = self.handler.info.fingerprint
        self.dtype = self.handler.info.dtype
        self.size = 1
        self.requests: list[Request] = []

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            with ONE_AT_A_TIME:
                self.requests.append(request)
                reply = self.handler.handle(request)
            yield number, reply

    def take_retries(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing was started."""


def spec(**fields: object) -> JobSpec:
    sizes = {"calibration": 6, "search": 4, "held_out": 8, "unit": "samples"}
    model = {"path": "llava-12", "dtype": "float32"}  # its bfloat16 is emulated, slowly, on many CPUs
    base = {"model": model, "task": "easy-vqa", "actions": ["skip", "freeze", "bypass"], "splits": sizes}
    return JobSpec.model_validate({**base, **fields})


def context(db: Database, worker: OneWorker, wanted: JobSpec) -> JobContext:
    """A new claimed job."""
    inputs = prepare(wanted)
    job = jobs.submit_claimed(db, wanted.model_dump(mode="json", exclude={"database"}), "hash", "me", 600)
    return JobContext(db, job, inputs, worker, Progress())  # type: ignore[arg-type]


def load_exports_here(patch: pytest.MonkeyPatch) -> None:
    """Let what verifies an export load it in this process."""

    plainly = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[1:3] != ["-I", fresh_process.__file__]:
            return plainly(command, **options)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(sys, "meta_path", [*sys.meta_path])
            fresh_process.main(command[3])
        return subprocess.CompletedProcess(command, 0, "", "")

    patch.setattr(verification.subprocess, "run", run)


def lock_apart(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let what times in this process wait for no other process on this machine."""
    patch.setattr(lock, "tempfile", SimpleNamespace(gettempdir=lambda: str(directory)))
