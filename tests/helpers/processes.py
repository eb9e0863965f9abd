"""Serving processes, their workers, and tiny jobs for them."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.job.inputs import prepare
from optimizer.job.spec import JobSpec
from optimizer.service import runner
from storage.database import Database
from storage.queue import jobs, stages
from storage.queue.jobs import Job
from storage.records import evaluations

PROJECT = Path(__file__).resolve().parents[2]


TASK = "task/task.yaml"
SAMPLES = 128


def write_task(model: Path) -> None:
    """Put a task into a model's directory whose right answers are the model's own, so that plans lose accuracy.

    A bundled task has so many samples that reading it outlasts a tiny job.
    """
    import easy_vqa

    questions, _, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    asked = dict(sorted(zip(images, questions, strict=True))[:: len(questions) // SAMPLES][:SAMPLES])
    directory = (model / TASK).parent
    directory.mkdir()
    for image in asked:
        shutil.copy(paths[image], directory / f"{image}.png")
    (model / TASK).write_text(
        """\
name: tiny
source: {kind: file, path: data.csv}
prompt: "{question}"
answer: {kind: short, max_new_tokens: 2}
metric: exact_match
splits: {calibration: 2, search: 2, held_out: 2, unit: samples}
"""
    )
    _write_samples(directory, [(f"{image}.png", question, "unknown") for image, question in asked.items()])
    _write_samples(directory, _answered(model))


def _answered(model: Path) -> list[tuple[str, str, str]]:
    from workers.evaluation.plain import PlainEvaluator
    from workers.messages import ModelSource
    from workers.models.loading import load_model
    from workers.runtime.plan import SkipPlan
    from workers.tasks import load_spec, load_task

    task = load_task(load_spec(model / TASK).with_splits(calibration=1, search=1, held_out=SAMPLES - 2))
    samples = [*task.calibration, *task.search, *task.held_out]
    loaded = load_model(ModelSource(str(model), device="cpu"))
    texts = (
        PlainEvaluator(loaded, task)
        .answer(SkipPlan.parse("R" * loaded.model.config.text_config.num_hidden_layers), samples)
        .texts
    )
    return [(Path(each.image.path).name, each.question, texts[each.id]) for each in samples if texts[each.id].strip()]


def _write_samples(directory: Path, rows: list[tuple[str, str, str]]) -> None:
    with (directory / "data.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "question", "answers"), *rows])


def tiny_job(model: Path, number: int, **cluster: Any) -> JobSpec:
    """A job that ends the same on any machine: no measured time steers its search.

    Jobs of different numbers have search splits of different sizes, so that none can take over another's evaluations.
    """
    return JobSpec.model_validate(
        {
            "model": {"path": str(model), "device": "cpu"},
            "task": str(model / TASK),
            "constraint": {"max_accuracy_drop": 1.0},
            "search": {
                "trials": 16,
                "batch": 4,
                "finalists": 2,
                "latency_model": "layers",
                "seeds": "none",
                "warm_start": False,
                "seed": number,
            },
            "splits": {"calibration": 4, "search": 12 + number % 64, "held_out": 24, "unit": "samples"},
            "workload": {"new_tokens": 1},
            "latency": {"precision": 0.5, "max_seconds": 0.2},
            "attempts": 1000,
            "cluster": {"workers": 1 + number % 2, "cpus_per_worker": 0.5, "max_attempts": 100, **cluster},
        }
    )


def submit(db: Database, spec: JobSpec) -> Job:
    """Queue a job, even if there is one like it."""
    job, _ = runner.submit(db, prepare(spec), anew=True)
    return job


@dataclass
class Serving:
    """A ``skipplan serve`` process; what it logs goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, url: str, log: Path, *options: str, environment: Mapping[str, str] = os.environ) -> Serving:
        inherited = {key: value for key, value in environment.items() if not key.startswith("SKIPPLAN_")}
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
        return workers_below(self.process.pid)

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory ends."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for an orderly end."""
        self.process.terminate()
        return self.process.wait(120)


class TwoNodes:
    """The cluster in a process of its own."""

    def __init__(self, directory: Path) -> None:
        token = directory / "token"
        token.write_text("0123456789abcdef" * 4)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = plain | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "TMPDIR": str(directory),  # where the locks of the device lie
            "RAY_TMPDIR": "/tmp",  # paths of sockets must be short
            "RAY_worker_niceness": "0",  # else any other work on the machine keeps workers from starting
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "two_nodes.py")],
            env=self.environment | {"PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(directory / "nodes.log").open("wb"),
            text=True,
        )
        self.address = self._answer()

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def workers(self) -> list[int]:
        """The processes on its nodes that hold models."""
        return workers_below(self._process.pid)

    def stop(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=60)
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster did not start, or ended"
        return line


def workers_below(process: int) -> list[int]:
    """Ray's workers of this project among the descendants of a process."""
    return [each for each in descendants(process) if b"ray::Worker" in command_line(each)]


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

    from optimizer.search.trial import SearchOutcome

    outcome = TypeAdapter(SearchOutcome).validate_python(stages.stages(db, job)["search"].payload["value"])
    return [(each.plan, each.latency_ratio, each.difference) for each in outcome.front()]


def measured(db: Database, job: int) -> dict[tuple[str, str, int], tuple[float, ...]]:
    """Scores by plan, split and number of samples. Fails on a repeated or a failed evaluation."""
    found: dict[tuple[str, str, int], tuple[float, ...]] = {}
    for each in evaluations.for_job(db, job):
        key = (each.plan, each.split, each.n_samples)
        assert key not in found, f"{key} is there twice"
        assert each.failure is None, each.failure
        found[key] = each.scores
    return found
