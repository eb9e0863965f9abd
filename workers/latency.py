"""Latency: an additive profile per layer and action, and paired comparisons of a plan against dense.

A request is one ``generate`` call on prompts of the task, prefill and a forced number of new tokens, with everything a
caller pays for but the processor. Separate blocks of repeats drift apart on a busy machine, so what is compared is
always measured in turns.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import MeasurementError
from .evaluation import prepare_batch
from .messages import LatencyComparison, LatencyProfile, Workload
from .models import LoadedModel
from .prompts import to_device
from .runtime import apply
from .runtime.descriptor import FamilyDescriptor, validate
from .runtime.families import describe
from .runtime.plan import Action, PlanError, SkipPlan
from .tasks import Task

DEFAULT_WORKLOAD = Workload()
WARM_UP_REQUESTS = 3
CHECK_PLANS = 4
PAIRS_PER_LOOK = 10
LATE_PAIRS = 5
"""Fewest pairs an interval is made of when time is up."""
RESAMPLES = 2000


@dataclass(frozen=True)
class PreparedRequest:
    """Model inputs on the device and the number of tokens to generate."""

    inputs: dict[str, Any]
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Length of the padded prompts."""
        return int(self.inputs["input_ids"].shape[1])


def device_name(device: torch.device) -> str:
    """Name what latency depends on: the GPU, or the processor and torch's threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def prepare_request(loaded: LoadedModel, task: Task, workload: Workload) -> PreparedRequest:
    """Build the request from the first calibration samples whose images open.

    Raises:
        MeasurementError: the split has too few for the batch size.
    """
    if workload.batch_size < 1 or workload.new_tokens < 1:
        raise MeasurementError("a workload needs a batch_size and new_tokens of at least 1")
    samples = task.calibration
    start = 0
    usable: list[Any] = []
    while len(usable) < workload.batch_size and start < len(samples):
        chunk = samples[start : start + workload.batch_size]
        usable += prepare_batch(loaded, task, chunk).samples
        start += len(chunk)
    if len(usable) < workload.batch_size:
        raise MeasurementError(
            f"the calibration split has {len(usable)} usable samples, fewer than the batch_size {workload.batch_size}"
        )
    batch = prepare_batch(loaded, task, usable[: workload.batch_size])
    assert batch.inputs is not None
    return PreparedRequest(to_device(batch.inputs, loaded.device, loaded.model.dtype), workload.new_tokens)


def run_request(loaded: LoadedModel, request: PreparedRequest) -> Any:
    """Generate exactly ``new_tokens`` tokens greedily; return the library's output with its KV cache."""
    with torch.inference_mode():
        return loaded.model.generate(
            **request.inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=request.new_tokens,
            max_new_tokens=request.new_tokens,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )


def time_request(loaded: LoadedModel, request: PreparedRequest) -> float:
    """Seconds of one request, the device idle before and after."""
    _synchronise(loaded.device)
    started = time.perf_counter()
    run_request(loaded, request)
    _synchronise(loaded.device)
    return time.perf_counter() - started


def profile_latency(
    loaded: LoadedModel,
    task: Task,
    *,
    actions: str = "RS",
    repeats: int = 20,
    workload: Workload = DEFAULT_WORKLOAD,
    seed: int = 0,
) -> LatencyProfile:
    """Time every layer under every action.

    A layer's cost under run, freeze and bypass is timed by hooks around it, in a plan that gives that action to every
    layer that may take it; where a layer may not, its cost under run stands. A skipped layer is not executed and costs
    nothing. The additive prediction is then held against measured times of random check plans; its error is part of
    the profile.

    Raises:
        MeasurementError: unknown actions or no repeats.
    """
    letters = _letters(actions)
    if repeats < 1:
        raise MeasurementError(f"repeats must be at least 1, not {repeats}")
    descriptor = describe(loaded.model)
    request = prepare_request(loaded, task, workload)
    uniform = {letter: _uniform_plan(letter, descriptor.allowed) for letter in letters if letter != "S"}
    checks = _check_plans(letters, descriptor, random.Random(seed))
    dense = SkipPlan.dense(descriptor.num_layers)
    with apply(loaded.model, dense):
        for _ in range(WARM_UP_REQUESTS):
            time_request(loaded, request)
    layers: dict[str, list[list[float]]] = {letter: [] for letter in uniform}
    hooked_totals: list[float] = []
    times: dict[SkipPlan, list[float]] = {plan: [] for plan in (dense, *checks)}
    for _ in range(repeats):
        for letter, plan in uniform.items():
            with apply(loaded.model, plan), _layer_timers(loaded, descriptor.stack_path) as timers:
                total, per_layer = timers.time(lambda: run_request(loaded, request))
            layers[letter].append(per_layer)
            if letter == "R":
                hooked_totals.append(total)
        for plan, measured in times.items():
            with apply(loaded.model, plan):
                measured.append(time_request(loaded, request))
    dense_seconds = statistics.median(times[dense])
    # The hooks may read another clock than the wall's (see _LayerTimers): the dense request links the two.
    scale = dense_seconds / statistics.median(hooked_totals)
    layer_seconds = {letter: _scaled_medians(rows, scale) for letter, rows in layers.items()}
    if "S" in letters:
        runs = zip(descriptor.allowed, layer_seconds["R"], strict=True)
        layer_seconds["S"] = tuple(0.0 if Action.SKIP in allowed else seconds for allowed, seconds in runs)
    errors = []
    for plan in checks:
        # Against the dense request of the same round: a busy machine drifts between rounds.
        ratio = statistics.median(mine / its for mine, its in zip(times[plan], times[dense], strict=True))
        errors.append(abs(predict_seconds(dense_seconds, layer_seconds, plan) / (ratio * dense_seconds) - 1))
    return LatencyProfile(
        device=device_name(loaded.device),
        workload=workload,
        prompt_tokens=request.prompt_tokens,
        dense_seconds=dense_seconds,
        layer_seconds=layer_seconds,
        relative_error=statistics.median(errors),
    )


def predict_seconds(dense_seconds: float, layer_seconds: dict[str, tuple[float, ...]], plan: SkipPlan) -> float:
    """Additive prediction: dense minus what every layer saves under its action."""
    run = layer_seconds["R"]
    return dense_seconds - sum(
        run[layer] - layer_seconds[action.value][layer] for layer, action in enumerate(plan.actions)
    )


def compare_latency(
    loaded: LoadedModel,
    task: Task,
    plan: SkipPlan,
    *,
    workload: Workload = DEFAULT_WORKLOAD,
    precision: float = 0.02,
    confidence: float = 0.95,
    max_seconds: float = 60.0,
    seed: int = 0,
) -> LatencyComparison:
    """Time a plan against dense on the live model, in pairs whose order alternates.

    Pairs are added until the bootstrap interval of the median ratio is narrower than ``precision`` times the ratio, or
    ``max_seconds`` have passed (five pairs at least).

    Raises:
        PlanError: the model cannot take the plan.
    """
    request = prepare_request(loaded, task, workload)
    dense = SkipPlan.dense(len(plan))
    cache_sizes = []
    for candidate in (dense, plan):
        with apply(loaded.model, candidate):
            for _ in range(WARM_UP_REQUESTS):
                time_request(loaded, request)
            cache_sizes.append(cache_bytes(run_request(loaded, request).past_key_values))
    dense_times: list[float] = []
    plan_times: list[float] = []
    generator = np.random.default_rng(seed)
    deadline = time.perf_counter() + max_seconds
    while True:
        for takes_dense in (True, False) if len(dense_times) % 2 == 0 else (False, True):
            with apply(loaded.model, dense if takes_dense else plan):
                (dense_times if takes_dense else plan_times).append(time_request(loaded, request))
        pairs, late = len(dense_times), time.perf_counter() > deadline
        if pairs < (LATE_PAIRS if late else PAIRS_PER_LOOK) or (pairs % PAIRS_PER_LOOK and not late):
            continue
        ratios = [first / second for first, second in zip(dense_times, plan_times, strict=True)]
        low, high = median_interval(ratios, confidence, generator)
        if late or high - low <= precision * statistics.median(ratios):
            break
    return LatencyComparison(
        plan=plan.text,
        device=device_name(loaded.device),
        workload=workload,
        dense_seconds=statistics.median(dense_times),
        plan_seconds=statistics.median(plan_times),
        speedup=statistics.median(ratios),
        speedup_low=low,
        speedup_high=high,
        pairs=pairs,
        kv_cache_bytes_dense=cache_sizes[0],
        kv_cache_bytes_plan=cache_sizes[1],
    )


def median_interval(values: Sequence[float], confidence: float, generator: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979)."""
    data = np.asarray(values)
    medians = np.median(data[generator.integers(0, len(data), size=(RESAMPLES, len(data)))], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a KV cache object holds, each storage counted once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
            visit(vars(value))

    visit(cache)
    return sum(storages.values())


@dataclass
class _LayerTimers:
    """Start and end marks of every call of every layer.

    On a GPU they are CUDA events. On the CPU with one thread they are that thread's own CPU time: what other processes
    take from a shared core would otherwise fall on some layers and not on others. With more threads, wall time.
    """

    device: torch.device
    starts: list[list[Any]] = field(default_factory=list)
    ends: list[list[Any]] = field(default_factory=list)

    def mark(self) -> Any:
        """Return the present moment."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def time(self, request: Callable[[], object]) -> tuple[float, list[float]]:
        """Run a request; return its seconds and, summed over its calls, each layer's."""
        _synchronise(self.device)
        start = self.mark()
        request()
        end = self.mark()
        _synchronise(self.device)
        calls = zip(self.starts, self.ends, strict=True)
        return self._between(start, end), [sum(map(self._between, begun, done)) for begun, done in calls]

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start)


@contextmanager
def _layer_timers(loaded: LoadedModel, stack_path: str) -> Iterator[_LayerTimers]:
    """Time every call of every decoder layer that stands in the stack now."""
    timers, handles = _LayerTimers(loaded.device), []
    for layer, module in enumerate(loaded.model.get_submodule(stack_path).children()):
        timers.starts.append([])
        timers.ends.append([])
        handles += [
            module.register_forward_pre_hook(lambda *_, layer=layer: timers.starts[layer].append(timers.mark())),
            module.register_forward_hook(lambda *_, layer=layer: timers.ends[layer].append(timers.mark())),
        ]
    try:
        yield timers
    finally:
        for handle in handles:
            handle.remove()


def _letters(actions: str) -> str:
    known = "".join(action.value for action in Action)
    if not set(actions) <= set(known):
        raise MeasurementError(f"actions {actions!r}: allowed letters are {', '.join(known)}")
    return "".join(letter for letter in known if letter in actions or letter == "R")


def _uniform_plan(letter: str, allowed: Sequence[frozenset[Action]]) -> SkipPlan:
    action = Action(letter)
    return SkipPlan(tuple(action if action in choices else Action.RUN for choices in allowed))


def _check_plans(letters: str, descriptor: FamilyDescriptor, generator: random.Random) -> list[SkipPlan]:
    """Random valid plans with a quarter to a half of the layers under another action than run."""
    plans: list[SkipPlan] = []
    layers = descriptor.num_layers
    for _ in range(CHECK_PLANS * 20):
        actions = [Action.RUN] * layers
        for layer in generator.sample(range(layers), generator.randint(max(1, layers // 4), max(1, layers // 2))):
            choices = [action for action in descriptor.allowed[layer] if action.value in letters]
            actions[layer] = generator.choice(sorted(choices, key=lambda action: action.value))
        plan = SkipPlan(tuple(actions))
        try:
            validate(plan, descriptor)
        except PlanError:
            continue
        if plan not in plans and not plan.is_dense:
            plans.append(plan)
        if len(plans) == CHECK_PLANS:
            break
    # A model that may take nothing but run is still checked against itself.
    return plans or [SkipPlan.dense(layers)]


def _scaled_medians(rows: list[list[float]], scale: float) -> tuple[float, ...]:
    return tuple(scale * statistics.median(column) for column in zip(*rows, strict=True))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
