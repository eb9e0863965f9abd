"""Time a plan against dense in an engine: both are served at once and asked in turns.

Both servers hold their weights beside the worker's own model, so three copies must fit; the one that is not asked is
halted. Nothing is taken over from earlier requests: every prompt and every image is computed anew.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from workers.device import lock as device_lock
from workers.device.arithmetic import dtype_name
from workers.engines.interface import ENGINES, ChatReply, ChatRequest, Server, Serving
from workers.errors import EngineError, MeasurementError
from workers.latency.measure import median_interval
from workers.latency.request import cache_bytes, cache_of, device_name, prepare_request, run_request
from workers.messages import (
    CompareEngineLatency,
    EngineComparison,
    EngineFound,
    EngineLevel,
    EngineTimes,
    Workload,
)
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import has_chat_template
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.serving.checkpoint import write_served_checkpoint
from workers.serving.requests import LEAST_CACHE_BYTES, chat_request, context_of
from workers.tasks import Task

PROMPTS = 32
"""Samples whose prompts are asked in turns."""
REQUESTS_PER_PLACE = 2
"""Of a round of several requests at once: so many times their number, so that the engine is full most of the time."""
LEAST_ROUNDS = 5
ROUNDS_PER_LOOK = 5
ROOM = 1.25
"""In context and cache, for what an engine counts otherwise."""


@dataclass
class _Asked:
    """Collect the rounds and replies of one server at one concurrency."""

    server: Server
    seconds: list[float] = field(default_factory=list)
    replies: list[ChatReply] = field(default_factory=list)

    def ask(self, requests: Sequence[ChatRequest], concurrency: int) -> None:
        """Ask a round and add its time. Raises EngineError where an answer has not the length that was asked for."""
        started = time.perf_counter()
        replies = self.server.ask_all(requests, concurrency)
        self.seconds.append(time.perf_counter() - started)
        for request, reply in zip(requests, replies, strict=True):
            if reply.new_tokens != request.max_tokens:
                raise EngineError(
                    f"{self.server.engine} answered {reply.new_tokens} tokens where {request.max_tokens} were asked "
                    "for, so that times would be of other work"
                )
        self.replies += replies

    def times(self) -> EngineTimes:
        """Summarise the rounds."""
        per_token = [reply.seconds_per_token for reply in self.replies if not math.isnan(reply.seconds_per_token)]
        return EngineTimes(
            first_token_seconds=statistics.median(reply.first_token_seconds for reply in self.replies),
            seconds_per_token=statistics.median(per_token) if per_token else None,
            latency_seconds=statistics.median(reply.seconds for reply in self.replies),
            requests_per_second=len(self.replies) / math.fsum(self.seconds),
        )


def find_engine(name: str, loaded: LoadedModel) -> EngineFound:
    """Find an engine on this machine that can be asked about the model.

    Raises EngineError saying what is missing, MeasurementError for a model that cannot be asked by chat,
    UnknownNameError for another name.
    """
    installed = ENGINES[name].installed()
    _require_chat(loaded)
    if loaded.device.type not in installed.devices:
        raise EngineError(f"{name} computes on {', '.join(installed.devices)} here, not on {loaded.device.type}")
    return EngineFound(name, installed.version, installed.versions, installed.letters)


def compare_engine_latency(
    loaded: LoadedModel, task: Task, request: CompareEngineLatency, maps: Maps | None = None
) -> EngineComparison:
    """Serve dense and the plan (with ``maps`` folded in) in the engine, and time both at every concurrency.

    A pair of rounds asks both servers the same requests, the order alternating. Pairs are added until the bootstrap
    interval of their median ratio is narrower than ``precision`` times the ratio, or ``max_seconds`` have passed at
    this concurrency (five pairs at least).

    Raises:
        PlanError: the model cannot take the plan.
        MeasurementError: other workers do not leave the device, or the task cannot be asked by chat.
        EngineError, EngineLost: the engine is not there, does not start, or does not answer.
    """
    _require_chat(loaded)
    plan = SkipPlan.parse(request.plan)
    prompts, longest, failed = _prompts(loaded, task, request.workload.new_tokens)
    most = max(request.concurrencies)
    serving = _serving(loaded, task, request, longest)
    with (
        device_lock.timing(*loaded.devices),
        tempfile.TemporaryDirectory(prefix="skipplan-served-") as scratch,
        ExitStack() as running,
    ):
        servers = []
        for name, served, folded in (("dense", SkipPlan.dense(len(plan)), None), ("plan", plan, maps)):
            write_served_checkpoint(loaded, served, Path(scratch, name), folded)
            servers.append(running.enter_context(ENGINES[request.engine].serve(Path(scratch, name), serving)))
        for server in servers:  # compiles, and fills the pools
            server.ask_all(_round(prompts, 0, most), most)
            server.pause()
        generator = np.random.default_rng(request.seed)
        levels = [_level(servers, prompts, each, request, generator) for each in request.concurrencies]
        dense_tokens, tokens = map(_cache_tokens, servers)
    return EngineComparison(
        plan=request.plan,
        engine=request.engine,
        version=servers[0].version,
        device=device_name(*loaded.devices),
        dtype=serving.dtype,
        workload=request.workload,
        levels=tuple(levels),
        kv_cache_bytes=None if tokens is None else serving.kv_cache_bytes,
        dense_kv_cache_tokens=dense_tokens,
        kv_cache_tokens=tokens,
        failed_samples=failed,
    )


def _cache_tokens(server: Server) -> int | None:
    server.resume()
    return server.kv_cache_tokens()


def _require_chat(loaded: LoadedModel) -> None:
    if not has_chat_template(loaded.processor):
        raise MeasurementError("the model has no chat template, and engines are asked by chat; give it one")


def _prompts(loaded: LoadedModel, task: Task, new_tokens: int) -> tuple[list[ChatRequest], int, dict[str, str]]:
    """Return requests for the first calibration samples, tokens of the longest, and why others cannot be asked."""
    prompts: list[ChatRequest] = []
    failed: dict[str, str] = {}
    longest = 0
    for sample in task.calibration:
        if len(prompts) == PROMPTS:
            break
        prepared = prepare_batch(loaded, task, [sample])
        failed |= prepared.failed
        if prepared.inputs is not None:
            longest = max(longest, prepared.inputs["input_ids"].shape[1] + new_tokens)
            prompts.append(chat_request(task, sample, max_tokens=new_tokens, exactly=True))
    if not prompts:
        raise MeasurementError("no sample of the calibration split can be asked")
    return prompts, longest, failed


def _serving(loaded: LoadedModel, task: Task, request: CompareEngineLatency, longest: int) -> Serving:
    """Room for as many requests of the longest's tokens as are asked at once, the same for dense and the plan."""
    one = prepare_request(loaded, task, Workload(1, request.workload.new_tokens))
    bytes_per_token = cache_bytes(cache_of(run_request(loaded, one))) / (one.prompt_tokens + one.new_tokens)
    concurrency = max(request.concurrencies)
    context = context_of(loaded.model.config, int(ROOM * longest))
    needed = int(ROOM * bytes_per_token * max(context, concurrency * longest))
    return Serving(
        dtype=dtype_name(loaded.dtype),
        context_tokens=context,
        concurrency=concurrency,
        threads=torch.get_num_threads() if loaded.device.type == "cpu" else None,
        kv_cache_bytes=max(LEAST_CACHE_BYTES, needed),
        compiled=request.compiled,
    )


def _round(prompts: Sequence[ChatRequest], number: int, concurrency: int) -> list[ChatRequest]:
    """Return the requests of a round: the next ones in turn."""
    size = concurrency if concurrency == 1 else REQUESTS_PER_PLACE * concurrency
    return [prompts[(number * size + each) % len(prompts)] for each in range(size)]


def _level(
    servers: Sequence[Server],
    prompts: Sequence[ChatRequest],
    concurrency: int,
    request: CompareEngineLatency,
    generator: np.random.Generator,
) -> EngineLevel:
    dense, plan = (_Asked(server) for server in servers)
    deadline = time.perf_counter() + request.max_seconds
    while True:
        rounds = len(dense.seconds)
        asked = _round(prompts, rounds, concurrency)
        for each in (dense, plan) if rounds % 2 == 0 else (plan, dense):
            each.server.resume()  # the other is halted: engines that wait for work may do so by spinning
            each.ask(asked, concurrency)
            each.server.pause()
        rounds, late = rounds + 1, time.perf_counter() > deadline
        if rounds < LEAST_ROUNDS or (rounds % ROUNDS_PER_LOOK and not late):
            continue
        ratios = [first / second for first, second in zip(dense.seconds, plan.seconds, strict=True)]
        low, high = median_interval(ratios, request.confidence, generator)
        if late or high - low <= request.precision * statistics.median(ratios):
            break
    return EngineLevel(
        concurrency=concurrency,
        speedup=statistics.median(ratios),
        speedup_low=low,
        speedup_high=high,
        rounds=rounds,
        dense=dense.times(),
        plan=plan.times(),
    )
