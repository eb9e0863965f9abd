"""What a job costs: layer executions, seconds, bytes and rows, fitted on two models and checked on two others.

    SKIPPLAN_CACHE=CACHE PYTHONPATH=.:tests/helpers python tests/benchmarks/scaling.py

CACHE holds `smollm2-30` (`skipplan reference build smollm2`) and `families/qwen2-10` (`python -m
reference_training.train_families qwen2-10`). Jobs of two sizes run in this process on llava-12 and smollm2-30, and one
each on qwen2-10 and on a model of 20 layers with random weights; seconds are processor time. The model:

    layer executions = shared * kept * layers * plan samples
    seconds          = layer executions * (flop / rate + overhead) + requests * per request
    rows             = per layer * layers + per block * blocks + per trial * trials
    database bytes   = bytes of any job + per row * rows + per score * plan samples
    message bytes    = per block * blocks + per request * requests + per score * plan samples

Blocks are those of consecutive layers, layers * (layers + 1) / 2, each of which has its measurements. `shared` is the
share of layer executions that remain where plans share what they begin with, `kept` the mean share of
layers that a tried plan runs, and flop those of a decoder layer over a prompt. At the end: what a job on a 72B model
would take on GPUs of a given rate.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import tiny_llava
import torch
from scipy.optimize import nnls
from sqlalchemy import func, select

from optimizer.job.inputs import prepare
from optimizer.stages import pipeline
from storage.database import Database
from storage.queue import stages
from storage.records import evaluations
from storage.schema import Base
from workers.cache_directory import cache_directory
from workers.latency.request import prepare_request
from workers.messages import Reply, Request, Workload
from workers.runtime.locate import locate

SIZES = ((12, 32, 48), (24, 64, 96))
"""Trials, search samples and held-out samples of the jobs that the model is fitted on."""
CHECKED = (16, 48, 64)


class Metered(in_process.OneWorker):
    """Counts what goes to and fro, and the time of every kind of request."""

    def __init__(self, other: in_process.OneWorker) -> None:
        vars(self).update(vars(other))
        self.bytes, self.asked, self.seconds = 0, 0, Counter[str]()

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            with in_process.ONE_AT_A_TIME:
                began = time.process_time()
                reply = self.handler.handle(request)
                self.seconds[type(request).__name__] += time.process_time() - began
                self.asked += 1
                self.bytes += len(pickle.dumps(request)) + len(pickle.dumps(reply))
            yield number, reply


@dataclass(frozen=True)
class Measured:
    """One job's size and what it cost."""

    model: str
    layers: int
    flop: float
    """Of a decoder layer over a prompt, forward: two for each parameter and token."""
    trials: int
    plan_samples: int
    kept: float
    executions: int
    evaluation_seconds: float
    requests: int
    rows: int
    database_bytes: int
    message_bytes: int
    driver_seconds: float


def measure(name: str, path: str, size: tuple[int, int, int], directory: Path) -> Measured:
    """Run one whole job, and count."""
    trials, search, held_out = size
    spec = in_process.spec(
        model={"path": path, "dtype": "float32"},
        constraint={"max_accuracy_drop": 0.2, "min_dense_accuracy": 0.0},
        search={"trials": trials, "finalists": 2, "latency_model": "layers", "warm_start": False},
        splits={"calibration": 16, "search": search, "held_out": held_out, "unit": "samples"},
        workload={"new_tokens": 2},
        latency={"precision": 0.5, "max_seconds": 1.0},
        artifacts=str(directory / "artifacts"),
    )
    worker = Metered(in_process.OneWorker(path, prepare(spec).task))
    file = directory / f"{name}-{trials}.db"
    with Database.open(f"sqlite:///{file}") as db:
        before = _rows(db)
        context = in_process.context(db, worker, spec)
        began = time.process_time()
        pipeline.run(context)
        driver = time.process_time() - began - sum(worker.seconds.values())
        counted = stages.counters(db, context.job.id)
        kept = [sum(letter != "S" for letter in each.plan) / len(each.plan) for each in _scored(db, context.job.id)]
        rows = _rows(db) - before
    layer = locate(worker.handler.loaded.model).layers[0]
    tokens = _prompt_tokens(worker)
    return Measured(
        model=name,
        layers=worker.info[0].num_layers,
        flop=2.0 * sum(each.numel() for each in layer.parameters()) * tokens,
        trials=trials,
        plan_samples=int(counted["samples"]),
        kept=float(np.mean(kept)),
        executions=int(counted["layer_executions"]),
        evaluation_seconds=worker.seconds["EvaluatePlans"],
        requests=worker.asked,
        rows=rows,
        database_bytes=file.stat().st_size,
        message_bytes=worker.bytes,
        driver_seconds=driver,
    )


def _scored(db: Database, job: int) -> list[Any]:
    return [each for split in ("search", "held_out") for each in evaluations.for_job(db, job, split)]


def _rows(db: Database) -> int:
    with db.transaction() as session:
        counts = [session.scalar(select(func.count()).select_from(each)) for each in Base.metadata.sorted_tables]
    return sum(count or 0 for count in counts)


def _prompt_tokens(worker: in_process.OneWorker) -> int:
    return prepare_request(worker.handler.loaded, worker.handler.task, Workload(1, 1)).prompt_tokens


@dataclass(frozen=True)
class Costs:
    """The fitted constants."""

    shared: float
    rate: float
    overhead: float
    per_request: float
    rows_per_layer: float
    rows_per_block: float
    rows_per_trial: float
    job_bytes: float
    bytes_per_row: float
    bytes_per_score: float
    message_per_block: float
    message_per_request: float
    message_per_score: float

    def rows(self, layers: int, trials: int) -> float:
        return self.rows_per_layer * layers + self.rows_per_block * _blocks(layers) + self.rows_per_trial * trials

    def stored(self, rows: float, plan_samples: float) -> float:
        return self.job_bytes + self.bytes_per_row * rows + self.bytes_per_score * plan_samples

    def sent(self, layers: int, requests: float, plan_samples: float) -> float:
        own = self.message_per_block * _blocks(layers)
        return own + self.message_per_request * requests + self.message_per_score * plan_samples

    def executions(self, job: Measured) -> float:
        return self.shared * job.kept * job.layers * job.plan_samples

    def seconds(self, job: Measured) -> float:
        return job.executions * (job.flop / self.rate + self.overhead) + self.per_request * job.requests

    def predicted(self, job: Measured) -> dict[str, tuple[float, float]]:
        """What is predicted of a job's costs, and what it measured."""
        return {
            "layer executions": (self.executions(job), job.executions),
            "seconds of evaluation": (self.seconds(job), job.evaluation_seconds),
            "rows": (self.rows(job.layers, job.trials), job.rows),
            "database bytes": (self.stored(job.rows, job.plan_samples), job.database_bytes),
            "message bytes": (self.sent(job.layers, job.requests, job.plan_samples), job.message_bytes),
        }


def _blocks(layers: int) -> int:
    return layers * (layers + 1) // 2


def fit(jobs: list[Measured]) -> Costs:
    """Fit by least squares of relative errors; no constant is below zero."""
    shared = float(np.mean([job.executions / (job.kept * job.layers * job.plan_samples) for job in jobs]))
    seconds = [[job.executions * job.flop, job.executions, job.requests] for job in jobs]
    slope, overhead, per_request = _solve(seconds, [job.evaluation_seconds for job in jobs])
    rows = _solve([[job.layers, _blocks(job.layers), job.trials] for job in jobs], [job.rows for job in jobs])
    stored = _solve([[1.0, job.rows, job.plan_samples] for job in jobs], [job.database_bytes for job in jobs])
    messages = [[_blocks(job.layers), job.requests, job.plan_samples] for job in jobs]
    sent = _solve(messages, [job.message_bytes for job in jobs])
    return Costs(shared, 1 / slope if slope else float("inf"), overhead, per_request, *rows, *stored, *sent)


def _solve(columns: list[list[float]], values: list[float]) -> list[float]:
    scale = np.asarray(values, dtype=float)
    found, _ = nnls(np.asarray(columns, dtype=float) / scale[:, None], np.ones(len(values)))
    return [float(each) for each in found]


def random(directory: Path) -> str:
    """Write a model of 20 layers of another width than the others', with random weights: no plan answers as it does."""
    layers, tiny_llava.LAYERS = tiny_llava.LAYERS, 20
    try:
        sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
        return str(tiny_llava.save(directory / "random", sizes=sizes))
    finally:
        tiny_llava.LAYERS = layers


def outlook(costs: Costs, *, rate: float) -> dict[str, float]:
    """Costs of a default job (200 trials, 512 search and 1,000 held-out samples) on 72B parameters, 700 tokens."""
    layers, parameters, tokens = 80, 0.88e9, 700
    first, whole, held_out, climbing, requests = 128, 512, 1000, 0.35, 3000
    plan_samples = whole + 200 * (first + climbing * (whole - first)) + 7 * held_out
    executions = costs.shared * 0.8 * layers * plan_samples
    flop = 2 * parameters * tokens
    return {
        "plan_samples": plan_samples,
        "layer_executions": executions,
        "worker_hours_per_job": executions * flop / rate / 3600,
        "worker_hours_per_day_at_1000_jobs": 1000 * executions * flop / rate / 3600,
        "rows_per_day": 1000 * costs.rows(layers, 200),
        "database_gb_per_day": 1000 * costs.stored(costs.rows(layers, 200), plan_samples) / 1e9,
        "message_gb_per_day": 1000 * costs.sent(layers, requests, plan_samples) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=3e14, help="FLOP a second of the GPU in the outlook")
    parser.add_argument("--quick", action="store_true", help="a tiny model in the place of each, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        trained = str(cache_directory() / "families" / "qwen2-10" / "checkpoint")
        models = {"llava-12": "llava-12", "smollm2-30": "smollm2-30", "qwen2-10": trained, "random": random(directory)}
        if options.quick:
            tiny = str(tiny_llava.save(directory / "tiny"))
            models = {"llava-12": tiny, "smollm2-30": models["random"], "random": tiny}
        jobs = [measure(each, models[each], size, directory) for each in ("llava-12", "smollm2-30") for size in SIZES]
        for job in jobs:
            print(json.dumps(asdict(job)), flush=True)
        costs = fit(jobs)
        print(json.dumps(asdict(costs), indent=2), flush=True)
        for name in [each for each in ("qwen2-10", "random") if each in models]:
            checked = measure(name, models[name], CHECKED, directory)
            print(json.dumps(asdict(checked)))
            print(f"| cost, {name} | predicted | measured | error |\n|---|---|---|---|")
            for cost, (expected, found) in costs.predicted(checked).items():
                print(f"| {cost} | {expected:.4g} | {found:.4g} | {expected / found - 1:+.0%} |")
    print(json.dumps(outlook(costs, rate=options.rate), indent=2))


if __name__ == "__main__":
    main()
