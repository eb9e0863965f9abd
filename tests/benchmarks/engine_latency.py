"""Speed-up of plans in an engine beside that under ``generate``, each in turns with dense.

    SKIPPLAN_VLLM_PYTHON=vllm/bin/python PYTHONPATH=. python tests/benchmarks/engine_latency.py llava-12 easy-vqa \
        RRRRRRRRRSSS RRRSRSRSRSRS RRRSRSSSSSSS --seconds 30

For every plan: the speed-up by its number of layers alone (dense layers / layers left), by ``generate`` at one request,
and by the engine at every concurrency, medians over pairs with a 95 % interval; time to first token and of each token
after it. The model computes in ``--dtype``, on ``--threads`` threads, in ``generate`` and in the engine. Keep the
machine quiet.
"""

from __future__ import annotations

import argparse
import time

import torch

from workers.latency.measure import compare_latency
from workers.latency.request import device_name
from workers.messages import CompareEngineLatency, CompareLatency, ModelSource, Workload
from workers.models.loading import load_model
from workers.runtime import SkipPlan
from workers.serving.latency import compare_engine_latency
from workers.tasks import load_spec, load_task

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("task")
parser.add_argument("plans", nargs="+")
parser.add_argument("--engine", default="vllm")
parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
parser.add_argument("--new-tokens", type=int, default=4)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--seconds", type=float, default=30.0)
given = parser.parse_args()

torch.set_num_threads(given.threads)
task = load_task(load_spec(given.task).with_splits(calibration=64, search=1, held_out=1))
loaded = load_model(ModelSource(given.model, dtype=given.dtype), device="cpu", measuring=True)
workload = Workload(1, given.new_tokens)
print(f"{given.model}, {given.task}, {given.new_tokens} new tokens, {given.dtype}, {device_name(loaded.device)}")
print("| plan | layers | by layers | generate | engine | first token, ms | each token, ms | cache tokens |")
print("|---|---|---|---|---|---|---|---|")
for plan in given.plans:
    started = time.time()
    own = compare_latency(loaded, task, CompareLatency(plan, workload, max_seconds=given.seconds))
    request = CompareEngineLatency(plan, given.engine, tuple(given.concurrency), workload, max_seconds=given.seconds)
    found = compare_engine_latency(loaded, task, request)
    for level in found.levels:
        left = len(SkipPlan.parse(plan).kept)
        tokens = [level.dense.seconds_per_token, level.plan.seconds_per_token]
        print(
            f"| `{plan}` | {left} of {len(plan)} | {len(plan) / left:.2f} "
            f"| {own.speedup:.2f} [{own.speedup_low:.2f}, {own.speedup_high:.2f}] "
            f"| {given.engine} {found.version}, {level.concurrency} at once: {level.speedup:.2f} "
            f"[{level.speedup_low:.2f}, {level.speedup_high:.2f}], n = {level.rounds} "
            f"| {1000 * level.dense.first_token_seconds:.1f} -> {1000 * level.plan.first_token_seconds:.1f} "
            f"| {' -> '.join('' if each is None else f'{1000 * each:.2f}' for each in tokens)} "
            f"| {found.dense_kv_cache_tokens} -> {found.kv_cache_tokens} |",
            flush=True,
        )
    print(f"<!-- {time.time() - started:.0f} s -->", flush=True)
