"""A cluster whose workers only take time: the real service, stages, pool and database on a clock that jumps.

Ray is replaced by a list of answers that are due; everything that decides who works on what when is the product's own.
The clock jumps to the next answer as soon as all threads wait for one. Scores come from planted harms.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import zlib
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from planted import Planted, random_problem

from optimizer.job.inputs import JobInputs, model_source
from optimizer.search.space import Candidate
from optimizer.service import pool as service_pool
from optimizer.stages import together
from workers.cluster import pool as pools
from workers.cluster import share as shares
from workers.cluster.actor import TaskReference
from workers.cluster.pool import WorkerPool
from workers.cluster.share import PoolShare
from workers.cluster.slots import Slot
from workers.messages import (
    Alone,
    CompareLatency,
    CompareText,
    EvaluateOtherTask,
    EvaluatePlans,
    Evaluation,
    Evaluations,
    FitGuards,
    FittedGuard,
    FittedGuards,
    KindSums,
    LatencyComparison,
    LatencyProfile,
    MeasureRedundancy,
    ProfileLatency,
    RedundancySums,
    Reply,
    Request,
    SentAway,
    ShownSamples,
    ShowSamples,
    TextDivergence,
    WorkerInfo,
)
from workers.redundancy.kinds import GROUPS, HISTOGRAM_EDGES, TAIL_THRESHOLDS
from workers.redundancy.sums import sample_sums
from workers.runtime import SkipPlan
from workers.tasks import Task

GRACE_SECONDS = 0.0003
"""Real seconds in which a thread that has just been given something takes it up."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a 7B model on a GPU: prompts of 600 tokens, 32 layers. Assumed, not measured."""

    layers: int = 32
    layer: float = 0.002
    """Of a decoder layer and a prompt."""
    image: float = 0.02
    """Of the vision tower and the processor, for a sample."""
    decode: float = 0.025
    """Of a token behind the prompt."""
    request: float = 0.3
    """Of every request, whatever it asks."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a request's seconds."""

    @property
    def dense(self) -> float:
        """Of a timed request of the dense model, with four new tokens."""
        return self.layers * self.layer + 3 * self.decode

    def evaluation(self, plans: Sequence[str], samples: int) -> float:
        """Of plans that share the layers of what they begin with alike."""
        begun = {plan[: layer + 1] for plan in plans for layer in range(len(plan)) if plan[layer] != "S"}
        return samples * (self.image + self.layer * len(begun))


@dataclass(eq=False)
class Answer:
    """An answer that a worker will have given at a time of the simulated clock."""

    worker: int
    request: Request
    began: float
    ends: float
    reply: Reply


@dataclass
class SimulatedCluster:
    """Workers, each on a GPU of its own or sharing the processor of their node, and what they did when.

    With ``driver`` the driver's own time counts at its real length; else it takes none.
    """

    nodes: int
    workers_per_node: int
    gpus: bool = True
    driver: bool = True
    costs: Costs = field(default_factory=Costs)
    done: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due: list[Answer] = []
        self._jumped = 0.0
        self._started = time.monotonic()
        self._planted: dict[str, Planted] = {}
        own = {threading.get_ident(), threading.main_thread().ident}
        self._strangers = frozenset(sys._current_frames().keys() - own)
        """Threads of before, such as Ray's of other tests and those of pytest's workers: nothing waits for them."""

    @property
    def size(self) -> int:
        return self.nodes * self.workers_per_node

    def device(self, worker: int) -> str:
        node = worker // self.workers_per_node
        return f"node-{node} gpu-{worker}" if self.gpus else f"node-{node} cpu"

    def now(self) -> float:
        return self._jumped + (time.monotonic() - self._started if self.driver else 0.0)

    def busy_share(self) -> float:
        """Share of all workers' time that they worked, from the first request's beginning to the last one's end."""
        began, ended = min(each.began for each in self.done), max(each.ends for each in self.done)
        return sum(each.ends - each.began for each in self.done) / (self.size * (ended - began))

    def seconds(self) -> float:
        return max(each.ends for each in self.done) - min(each.began for each in self.done)

    # In the place of Ray ------------------------------------------------------------------------------------------

    @contextmanager
    def in_place_of_ray(self) -> Iterator[None]:
        """Let the service start its workers here."""
        ray = SimpleNamespace(
            put=lambda value: value,
            get=lambda answer: answer.reply,
            wait=self._wait,
            is_initialized=lambda: False,
        )

        def start(inputs: JobInputs) -> WorkerPool:
            return _Pool(self, inputs).start()

        with (
            patch.object(pools, "ray", ray),
            patch.object(shares, "ray", ray),
            patch.object(service_pool, "_start", start),
        ):
            yield

    def ask(self, worker: int, request: Request, task: TaskReference) -> Answer:
        reply, seconds = self._answer(request, task)
        about = _without_tasks(request)
        chance = np.random.default_rng(zlib.crc32(about.encode()))
        noise = float(chance.lognormal(0, self.costs.spread))
        began = self.now()
        answer = Answer(worker, request, began, began + (self.costs.request + seconds) * noise, reply)
        self._due.append(answer)
        self.done.append(answer)
        return answer

    def _wait(
        self, answers: Sequence[Answer], *, num_returns: int, timeout: float
    ) -> tuple[list[Answer], list[Answer]]:
        give_up = time.monotonic() + timeout
        while True:
            now = self.now()
            ready = [each for each in answers if each.ends <= now][:num_returns]
            if ready or time.monotonic() >= give_up:
                self._due = [each for each in self._due if each not in ready]
                return ready, []
            if _others_wait(self._strangers):
                time.sleep(GRACE_SECONDS)
                if _others_wait(self._strangers):
                    due = min(each.ends for each in self._due)
                    self._jumped += max(0.0, due - self.now())
                    if not any(each.ends <= self.now() for each in answers):
                        return [], []  # handed out meanwhile: the pool asks again, for that too
                    continue
            time.sleep(GRACE_SECONDS)

    # What workers answer ------------------------------------------------------------------------------------------

    def _answer(self, request: Request, task: TaskReference) -> tuple[Reply, float]:
        costs, asked = self.costs, task.reference[0]
        match request:
            case EvaluatePlans():
                return self._evaluate(request, task.key, asked)
            case ProfileLatency():
                return self._profile(request), min(60.0, 20 * 9 * costs.dense)
            case MeasureRedundancy():
                samples = len(range(request.shard, len(asked.calibration), request.shards))
                return self._redundancy(request, samples), 3 * costs.evaluation(["R" * costs.layers], samples)
            case CompareLatency():
                return self._compare(request), 60.0
            case EvaluateOtherTask():
                samples = request.task.held_out[request.start : request.n_samples]
                scores = (1.0,) * len(samples)
                ids = tuple(sample.id for sample in samples)
                found = Evaluation(request.plan, "held_out", ids, scores, {}, {}, 1.0)
                return found, costs.evaluation([request.plan], len(samples)) + len(samples) * costs.decode
            case CompareText():
                return TextDivergence(request.plan, 8192, 0.1, 2.0, 2.1), 32 * costs.layers * costs.layer
            case FitGuards():
                samples = min(256, len(asked.calibration)) + min(512, len(asked.search)) + min(400, len(asked.held_out))
                return self._guards(request), samples * (costs.image + 3 * costs.layer)
            case ShowSamples():
                return ShownSamples(()), len(request.indices) * costs.dense
        raise NotImplementedError(f"no simulated answer to {type(request).__name__}")

    def _evaluate(self, request: EvaluatePlans, key: str, task: Task) -> tuple[Reply, float]:
        planted = self._planted.setdefault(key, _plant(self.costs.layers, key))
        samples = task.split(request.split)[request.start : request.n_samples]
        stop = request.start + len(samples)
        seconds = self.costs.evaluation(request.plans, len(samples))
        results = []
        for plan in request.plans:
            scores = planted.scores(Candidate(SkipPlan.parse(plan)), stop)
            results.append(
                Evaluation(
                    plan,
                    request.split,
                    tuple(sample.id for sample in samples),
                    scores.values[request.start :],
                    {},
                    {},
                    seconds / len(request.plans),
                    kl=scores.kl[request.start :] if scores.kl else None,
                    layer_executions=round(len(samples) * SkipPlan.parse(plan).executions),
                    path="fast",
                )
            )
        return Evaluations(tuple(results)), seconds

    def _profile(self, request: ProfileLatency) -> LatencyProfile:
        shares = {"R": 1.0, "F": 0.4, "B": 0.5, "S": 0.0}
        of = {letter: (shares[letter] * self.costs.layer,) * self.costs.layers for letter in request.actions}
        decode = {letter: (shares[letter] * self.costs.decode / 32,) * self.costs.layers for letter in request.actions}
        prefill = self.costs.layers * self.costs.layer
        about = ("simulated", request.workload, 600, self.costs.dense, prefill, self.costs.decode)
        return LatencyProfile(*about, prefill_seconds=of, decode_seconds=decode, relative_error=0.01)

    def _compare(self, request: CompareLatency) -> LatencyComparison:
        kept = len(SkipPlan.parse(request.plan).kept) / self.costs.layers
        dense, speedup = self.costs.dense, 1 / max(kept, 0.1)
        times = (dense, dense / speedup, speedup, 0.99 * speedup, 1.01 * speedup, 100)
        return LatencyComparison(request.plan, "simulated", request.workload, *times, 1000, round(1000 * kept))

    def _redundancy(self, request: MeasureRedundancy, samples: int) -> RedundancySums:
        chance, layers = np.random.default_rng(request.shard), self.costs.layers
        values = chance.random((2 + len(TAIL_THRESHOLDS), len(GROUPS), layers, samples))
        histogram = chance.integers(1, 9, (len(GROUPS), layers, len(HISTOGRAM_EDGES) - 1))
        sums = KindSums({"distances": sample_sums(values, np.ones_like(values)), "histogram": histogram})
        return RedundancySums(layers, samples, dict.fromkeys(request.kinds, sums), {"states": samples * layers})

    def _guards(self, request: FitGuards) -> FittedGuards:
        away = SentAway(100, 1)
        tasks = {task.name: away for task in request.tasks}
        text = None if request.text is None else away
        of = [FittedGuard(layer, b"guard", 100, 100, away, tasks, text, 0.01, 0.001) for layer in request.layers]
        return FittedGuards(tuple(of))


def _without_tasks(request: Request) -> str:
    """Write a request down, without tasks and their thousands of samples."""
    return str({name: value for name, value in vars(request).items() if not name.startswith("task")})


def _plant(layers: int, key: str) -> Planted:
    return replace(random_problem(layers, "RFBS", zlib.crc32(key.encode())), samples=4096)


def _others_wait(strangers: Container[int | None]) -> bool:
    """Whether every other thread of the service waits for something: nothing happens before the next answer."""
    here = threading.get_ident()
    gc.disable()  # collecting inside the next call can end in a deadlock of the interpreter (CPython issue 106883)
    frames = sys._current_frames()
    gc.enable()
    return all(_waits(frame) for thread, frame in frames.items() if thread != here and thread not in strangers)


def _waits(frame: FrameType) -> bool:
    """Whether a thread waits, and not for the processor alone: what it waits for has not come yet."""
    code, names = frame.f_code, frame.f_locals
    if code.co_filename == threading.__file__:
        if code.co_name == "wait":
            return "waiter" in names and bool(names["waiter"].locked())
        return code.co_name in ("join", "_wait_for_tstate_lock") and bool(names["self"].is_alive())
    return code.co_filename == together.__file__ and "self" in names and bool(names["self"]._turn.locked())


class _Actor:
    """A worker's process, as the pool sees it."""

    def __init__(self, cluster: SimulatedCluster, number: int) -> None:
        self.handle = SimpleNamespace(remote=lambda request, task: cluster.ask(number, request, task))


class _Pool(WorkerPool):
    """The pool itself, whose workers are there at once and never die."""

    def __init__(self, cluster: SimulatedCluster, inputs: JobInputs) -> None:
        settings = service_pool.cluster_settings(inputs)
        super().__init__(settings, model_source(inputs.spec), inputs.task)
        self._simulated, self.fingerprint, self.dtype = cluster, inputs.fingerprint, "bfloat16"

    def start(self) -> WorkerPool:
        nothing: Any = lambda *arguments: None  # noqa: E731
        self._telemetry = SimpleNamespace(answered=nothing, retried=nothing, lost=nothing, count=nothing)  # type: ignore[assignment]
        self._own = PoolShare(self, self.task)
        for number in range(self._simulated.size):
            layers = self._simulated.costs.layers
            about = (number, "simulated", "simulated", 1, "llava", self.fingerprint, layers, ("RFBS",) * layers)
            info = WorkerInfo(*about, 7_000_000_000, self.dtype, device_id=self._simulated.device(number))
            slot = Slot(number, _Actor(self._simulated, number), None, float("inf"), stage="ready", info=info)
            self._slots.append(slot)
        return self

    def _look_at_cluster(self, *, welcome: bool = True) -> None:
        pass

    def check_cluster(self, *, counts: bool = True) -> None:
        pass


def beside(cluster: SimulatedCluster) -> list[tuple[Answer, Answer]]:
    """Pairs of requests that ran at the same time on one device although one needs it alone."""
    found = []
    for one in (each for each in cluster.done if isinstance(each.request, Alone)):
        for other in cluster.done:
            same = cluster.device(one.worker) == cluster.device(other.worker)
            if other is not one and same and one.began < other.ends and other.began < one.ends:
                found.append((one, other))
    return found


def job_fields(number: int, artifacts: Path, **sizes: int) -> dict[str, Any]:
    """The fields of a job that shares nothing with those of other numbers: its splits are its own."""
    wanted = {"trials": 64, "batch": 8, "calibration": 128, "search": 512, "held_out": 1024} | sizes
    return {
        "model": {"path": "llava-12", "dtype": "float32"},
        "task": "easy-vqa",
        "criterion": "cosine",
        "actions": ["skip", "freeze", "bypass"],
        "constraint": {"max_accuracy_drop": 0.05},
        "search": {"trials": wanted["trials"], "batch": wanted["batch"], "seed": number, "warm_start": False},
        "splits": {
            "calibration": wanted["calibration"] + number,
            "search": wanted["search"] + number,
            "held_out": wanted["held_out"],
            "unit": "samples",
        },
        "collateral": {"tasks": ["scenes"], "samples": 200},
        "artifacts": str(artifacts),
    }
