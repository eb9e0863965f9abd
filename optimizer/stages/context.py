"""The context that every stage works in: the claimed job, its inputs, the workers, the database."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from optimizer.errors import Fault
from optimizer.job.inputs import JobInputs, task_hash
from optimizer.job.spec import JobSpec
from optimizer.search.goals import Goals
from optimizer.search.space import PlanSpace, plan_space
from optimizer.stages.failed_samples import FailedSamples
from optimizer.stages.judged import Judged, judged_of
from optimizer.stages.progress import Progress
from optimizer.stages.together import Turns
from storage.database import Database
from storage.queue import stages
from storage.queue.jobs import Job
from storage.records import lookup
from storage.records.lookup import ModelRecord, TaskRecord
from workers.messages import Failure, Reply, Request, WorkerInfo, Workload
from workers.tasks import Task
from workers.tasks.passages import TextTask

if TYPE_CHECKING:
    from workers.cluster.pool import WorkerPool
    from workers.cluster.share import PoolShare

T = TypeVar("T")

SCORING = 2
"""Version of how workers score plans, measure redundancy and fit maps: what others stored is not used again."""
LEAST_SLICE = 32
"""Fewest samples of a request where several workers share those of one."""

MANY_WORKERS = 8
"""With so many workers, the last slices are cut so fine that all workers end at about the same time."""

ROUND_SHARE, SMALLEST_SLICE = 0.6, 4
"""Of what is left, each round of slices takes so much, in slices of so many samples at least."""


class JobFailed(Fault):
    """The job cannot be done, for a reason that another attempt would meet too."""


@dataclass(frozen=True)
class JobContext:
    """One claimed job on its way through the stages."""

    db: Database
    job: Job
    inputs: JobInputs
    pool: WorkerPool | PoolShare
    progress: Progress
    turns: Turns = field(default_factory=Turns)
    """Of the stages that run together."""
    _under_way: dict[str, threading.Event] = field(default_factory=dict)

    @property
    def spec(self) -> JobSpec:
        return self.inputs.spec

    @property
    def task(self) -> Task:
        return self.inputs.task

    @cached_property
    def worker(self) -> WorkerInfo:
        """The first worker's description of the model; all workers hold the same one."""
        return self.pool.info[0]

    @property
    def devices(self) -> int:
        """The number of devices that the workers have."""
        return len({info.device_id for info in self.pool.info})

    @cached_property
    def space(self) -> PlanSpace:
        """The candidates that the job may propose. Raises UsageFault when none is left."""
        return plan_space(self.spec, self.worker, self.inputs.compensations)

    @cached_property
    def failed_samples(self) -> FailedSamples:
        """The samples that failed so far."""
        return FailedSamples(self.db, self.job, self.task, self.spec.max_failed_samples, self.progress.note)

    @property
    def workload(self) -> Workload:
        """The serving workload that latency is measured for."""
        return Workload(self.spec.workload.batch_size, self.spec.workload.new_tokens)

    @property
    def workload_name(self) -> str:
        """The workload as the database names it."""
        return workload_name(self.workload)

    @cached_property
    def model_id(self) -> int:
        """The id of the model's row."""
        model = ModelRecord(
            name=self.spec.model.path,
            fingerprint=self.worker.fingerprint,
            family=self.worker.model_family,
            num_layers=self.worker.num_layers,
            parameters=self.worker.parameters,
        )
        return lookup.ensure_model(self.db, model, self.spec.model.revision)

    @cached_property
    def task_id(self) -> int:
        """The id of the task's row."""
        return self.id_of(self.task)

    def id_of(self, task: Task | TextTask) -> int:
        """Return the id of a task's row: of the job's one, of one of several, or of what is judged beside them."""
        record = TaskRecord(
            name=task.name,
            task_hash=task_hash(task),
            data_hash=task.data_hash,
            definition_hash=task.definition_hash,
            split_seed=0 if isinstance(task, TextTask) else task.spec.splits.seed,
            calibration_size=len(task.calibration),
            search_size=len(task.search),
            held_out_size=len(task.held_out),
        )
        return lookup.ensure_task(self.db, record)

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """The job's tasks with their limits by name, then the tasks and text that are limited beside them."""
        return judged_of(self.spec, self.task)

    @cached_property
    def goals(self) -> Goals | None:
        """The limits on each of these; None where that is the job's one task, judged by its constraint."""
        if len(self.judged) == 1:
            return None
        return Goals(tuple(each.goal for each in self.judged.values()), self.spec.search.objective)

    @property
    def search_size(self) -> int:
        """Samples of the search splits of all that plans are judged by."""
        return len(self.task.search) if self.goals is None else self.goals.size

    @cached_property
    def settings(self) -> str:
        """Settings that scores depend on; evaluations of other jobs are only reused under the same ones."""
        device = "cpu" if "thread" in self.worker.device else self.worker.device
        versions = " ".join(f"{name}={version}" for name, version in sorted(self.worker.versions.items()))
        how = f"dtype={self.worker.dtype} attention={self.spec.model.attention} evaluation={self.spec.evaluation}"
        how += f" scoring={SCORING}"
        return f"{how} device={device} {versions}".strip()

    def load_or_compute(self, stage: str, kind: Any, compute: Callable[[], T]) -> T:
        """Read back what an earlier attempt stored of a stage, of type ``kind``; else compute and store it.

        Where it is being computed by another of the job's threads, wait for that.
        """
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        while (computed := self._under_way.get(stage)) is not None:
            with self.turns.waiting():
                computed.wait()
        recorded = stages.get(self.db, self.job.id, stage)
        if recorded is not None:
            return adapter.validate_python(recorded.payload["value"])
        self._under_way[stage] = threading.Event()
        try:
            value = compute()
            stages.record_stage(self.db, self.job, stage, {"value": adapter.dump_python(value, mode="json")})
        finally:
            self._under_way.pop(stage).set()
        return value

    def slices(self, start: int, stop: int, *, requests: int = 1) -> list[tuple[int, int]]:
        """Cut samples for the workers that there are for each of so many ``requests``, for many workers in rounds.

        Each round has a slice a worker, and slices shorter than those before, so that little is left to wait for at the
        end (factoring: Hummel, Schonberg, Flynn 1992).
        """
        workers = max(1, min(self.pool.size // requests, (stop - start) // LEAST_SLICE))
        if self.pool.size < MANY_WORKERS or workers == 1:
            return list(pairwise(start + (stop - start) * number // workers for number in range(workers + 1)))
        cuts = [start]
        while (left := stop - cuts[-1]) > 0:
            size = max(SMALLEST_SLICE, math.ceil(ROUND_SHARE * left / workers))
            count = min(workers, math.ceil(left / size))
            cuts += [min(stop, cuts[-1] + size * number) for number in range(1, count + 1)]
        return list(pairwise(cuts))

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | Failure]]:
        """Send requests to the workers; yield index and result as they arrive, other stages going on meanwhile."""
        results = iter(self.pool.run(requests))
        while True:
            with self.turns.waiting():
                found = next(results, None)
            if found is None:
                return
            yield found

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Send requests to the workers; yield index and reply as they arrive. Raises JobFailed for one that failed."""
        for index, result in self.run(requests):
            if isinstance(result, Failure):
                raise JobFailed(f"{type(result.request).__name__} failed: {result.reason}")
            yield index, result

    def ask_one(self, request: Request, subject: str) -> Reply | None:
        """Send one request and return its reply; None for one that failed, which is noted."""
        ((_, result),) = self.run([request])
        if isinstance(result, Failure):
            self.progress.note(f"{subject} could not be measured: {result.reason}")
            return None
        return result


def workload_name(workload: Workload) -> str:
    """Name a workload canonically, for example ``"batch 1, 4 new tokens"``."""
    return f"batch {workload.batch_size}, {workload.new_tokens} new tokens"
