"""Time the dense model in an engine with and without a plan as its draft model, in turns on the same prompts.

    SKIPPLAN_VLLM_PYTHON=vllm/bin/python PYTHONPATH=. python tests/benchmarks/engine_drafter.py llava-12 scenes \
        RRRSRSRSRRRS --engine vllm --count 100

Prints how many answers are equal, how many drafted tokens were kept, and the ratio of seconds, dense alone / with the
drafter, of whole requests and of each token behind the first: sums over prompts with a 95 % bootstrap interval, and
quartiles of the prompts' own ratios. The server that is not asked is halted. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from workers.engines.interface import ENGINES, ChatReply, Serving
from workers.latency.request import device_name
from workers.messages import ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan
from workers.serving.checkpoint import write_served_checkpoint
from workers.serving.requests import LEAST_CACHE_BYTES, chat_request, context_of
from workers.tasks import load_spec, load_task

WARM_UP = 3
RESAMPLES = 2000


def ratio(alone: list[float], drafted: list[float]) -> str:
    """Ratio of sums with its interval, and quartiles of the prompts' ratios."""
    first, second = np.array(alone), np.array(drafted)
    rows = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    low, high = np.quantile(first[rows].sum(1) / second[rows].sum(1), [0.025, 0.975])
    lower, _, upper = statistics.quantiles(first / second, n=4)
    value = first.sum() / second.sum()
    return f"{value:.3f} [{low:.3f}, {high:.3f}], quartiles {lower:.2f}, {upper:.2f}, n = {len(first)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("plan")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, help="most tokens of an answer; the task's own when left out")
    parser.add_argument("--draft-length", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    spec = load_spec(given.task)
    task = load_task(spec.with_splits(calibration=1, search=1, held_out=given.count + WARM_UP))
    loaded = load_model(ModelSource(given.model, dtype=given.dtype), device="cpu")
    tokens = given.new_tokens or spec.answer.max_new_tokens
    requests = [chat_request(task, sample, max_tokens=tokens) for sample in task.held_out[: given.count + WARM_UP]]
    plan, engine = SkipPlan.parse(given.plan), ENGINES[given.engine]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skipplan-drafter-")))
        for name, own in (("dense", SkipPlan.dense(len(plan))), ("drafter", plan)):
            write_served_checkpoint(loaded, own, scratch / name)
        servers = []
        for drafter in (None, scratch / "drafter"):
            serving = Serving(
                dtype=given.dtype,
                context_tokens=context_of(loaded.model.config, given.context),
                concurrency=1,
                threads=given.threads,
                kv_cache_bytes=2 * LEAST_CACHE_BYTES,
                drafter=drafter,
                draft_length=given.draft_length,
            )
            servers.append(stack.enter_context(engine.serve(scratch / "dense", serving)))
            servers[-1].pause()
        pairs: list[list[ChatReply]] = []
        for number, request in enumerate(requests):
            pair: list[ChatReply | None] = [None, None]
            for at in (0, 1) if number % 2 else (1, 0):
                servers[at].resume()
                pair[at] = servers[at].ask(request)
                servers[at].pause()
            if number >= WARM_UP:
                pairs.append([reply for reply in pair if reply is not None])
        servers[1].resume()
        counts = servers[1].drafts()
        version = servers[0].version
        servers[0].resume()
    print(
        f"{given.model}, {given.task}, {given.plan}, {given.engine} {version}, {given.dtype}, "
        f"{device_name(loaded.device)}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the end"
    )
    equal = sum(alone.text == drafted.text for alone, drafted in pairs)
    print(f"{equal} of {len(pairs)} answers equal; {sum(each.new_tokens for each, _ in pairs)} tokens; {counts}")
    print("requests:", ratio([alone.seconds for alone, _ in pairs], [drafted.seconds for _, drafted in pairs]))
    behind = [
        [(reply.seconds - reply.first_token_seconds) / (reply.new_tokens - 1) for reply in pair]
        for pair in pairs
        if all(reply.new_tokens > 1 for reply in pair)
    ]
    print("each token behind the first:", ratio([alone for alone, _ in behind], [drafted for _, drafted in behind]))


if __name__ == "__main__":
    main()
