"""How well the pool keeps workers busy: two real workers against one, and many that only sleep.

    python tests/benchmarks/worker_throughput.py                # both parts, about five minutes on two idle cores
    python tests/benchmarks/worker_throughput.py --real-only
    python tests/benchmarks/worker_throughput.py --simulated-only --workers 64 --seconds 1.0

Real: evaluations a second of llava-12 on easy-vqa, each request one plan, workers with one thread each. Simulated:
workers that take no CPU and sleep for every request, results written to an SQLite database as a job writes them; busy
is the time slept over the time that all workers together had, from the first request until none is left to hand out.
Workers and driver read the same clock, so that sleeps that begin before that moment and end after it count in part.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from storage.database import Database
from storage.queue import jobs, leases
from storage.records import evaluations, lookup
from storage.records.evaluations import EvaluationKey, EvaluationResult
from storage.records.lookup import ModelRecord, TaskRecord
from workers.cluster.actor import TaskReference
from workers.cluster.pool import WorkerPool
from workers.cluster.settings import ClusterSettings
from workers.messages import EvaluatePlans, Evaluation, Evaluations, Failure, ModelSource, WorkerInfo
from workers.tasks import Task, load_spec, load_task

MODEL, LAYERS, SAMPLES = "llava-12", 12, 96


class Sleeper:
    """Answers like a worker, but sleeps where one would compute."""

    seconds = 1.0

    def __init__(self, model: ModelSource, task: Task, settings: object) -> None:
        self._number = settings.worker  # type: ignore[attr-defined]

    def place(self) -> None:
        pass

    def setup(self) -> WorkerInfo:
        return WorkerInfo(self._number, "here", "none", 1, "llava", "f" * 64, LAYERS, ("RS",) * LAYERS, 0, "none")

    def handle(self, request: EvaluatePlans, task: TaskReference) -> Evaluations:
        began = time.monotonic()
        time.sleep(self.seconds)
        times = {"began": began, "ended": time.monotonic()}
        results = [Evaluation(plan, request.split, ("0",), (1.0,), times, {}, self.seconds) for plan in request.plans]
        return Evaluations(tuple(results))


def sleeper(seconds: float) -> type:
    return type("Sleeper", (Sleeper,), {"seconds": seconds})


def plans(count: int) -> list[str]:
    """Different plans that skip two to six layers."""
    chance = random.Random(0)
    found: set[str] = set()
    while len(found) < count:
        skipped = set(chance.sample(range(LAYERS), chance.randint(2, 6)))
        found.add("".join("S" if layer in skipped else "R" for layer in range(LAYERS)))
    return sorted(found)


def real_rate(workers: int, task: Task, count: int, dtype: str) -> float:
    """Evaluations a second, the workers warm."""
    settings = ClusterSettings(workers=workers, cpus_per_worker=1.0)
    with WorkerPool(settings, ModelSource(MODEL, device="cpu", dtype=dtype), task) as pool:
        requests = [EvaluatePlans((plan,), "search", SAMPLES, path="plain") for plan in plans(count)]
        list(pool.run(requests[: 2 * workers]))
        began = time.monotonic()
        for _, result in pool.run(requests):
            assert not isinstance(result, Failure), result.reason
        return count / (time.monotonic() - began)


def simulated_share(workers: int, seconds: float, rounds: int, task: Task, directory: Path) -> float:
    """Share of the workers' time that they slept."""
    settings = ClusterSettings(workers=workers, cpus_per_worker=0.0)
    requests = plans(workers * rounds)
    with (
        Database.open(f"sqlite:///{directory / 'busy.db'}") as db,
        WorkerPool(settings, ModelSource(MODEL, device="cpu"), task, worker=sleeper(seconds)) as pool,
    ):
        jobs.submit(db, {}, "benchmark")
        job = leases.claim(db, "benchmark", 3600)
        assert job is not None
        ids = {
            "model_id": lookup.ensure_model(
                db, ModelRecord(name=MODEL, fingerprint="f", family="llava", num_layers=LAYERS, parameters=1)
            ),
            "task_id": lookup.ensure_task(
                db,
                TaskRecord(name="t", task_hash="d", split_seed=0, calibration_size=1, search_size=1, held_out_size=1),
            ),
        }
        sleeps: list[tuple[float, float]] = []
        began = time.monotonic()
        for _, reply in pool.run([EvaluatePlans((plan,), "search") for plan in requests]):
            assert isinstance(reply, Evaluations)
            (result,) = reply.results
            assert isinstance(result, Evaluation)
            key = EvaluationKey(plan=result.plan, split="search", split_hash="s", n_samples=1, **ids)
            evaluations.record(db, job, key, EvaluationResult(scores=result.scores, seconds=result.seconds))
            sleeps.append((result.secondary["began"], result.secondary["ended"]))
        ended = max(start for start, _ in sleeps)  # afterwards some have nothing left to do
        return sum(min(end, ended) - start for start, end in sleeps) / (workers * (ended - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-only", action="store_true")
    parser.add_argument("--simulated-only", action="store_true")
    parser.add_argument("--evaluations", type=int, default=60, help="of each real measurement")
    parser.add_argument("--dtype", default="float32", help="of each real measurement: auto is the model's own")
    parser.add_argument("--workers", type=int, default=64, help="simulated ones")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a simulated evaluation")
    parser.add_argument("--rounds", type=int, default=20, help="simulated evaluations of each worker")
    options = parser.parse_args()
    task = load_task(load_spec("easy-vqa").with_splits(calibration=2, search=SAMPLES, held_out=2))
    figures: dict[str, float] = {}
    if not options.simulated_only:
        one, two = (real_rate(workers, task, options.evaluations, options.dtype) for workers in (1, 2))
        figures |= {"evaluations_per_second_1": one, "evaluations_per_second_2": two, "speedup": two / one}
    if not options.real_only:
        with tempfile.TemporaryDirectory() as directory:
            figures["busy_share"] = simulated_share(
                options.workers, options.seconds, options.rounds, task, Path(directory)
            )
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
