"""Measure latency: an additive profile per layer and action, and paired comparisons of a plan against dense.

Separate blocks of repeats drift apart on a busy machine, so plans are always compared in turns; and other
workers are kept off the device meanwhile.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from workers.device import lock as device_lock
from workers.device.memory import peak_bytes
from workers.errors import MeasurementError
from workers.messages import DEFAULT_WORKLOAD, CompareLatency, LatencyComparison, LatencyProfile, Workload
from workers.models.loading import LoadedModel
from workers.runtime import apply
from workers.runtime.descriptor import FamilyDescriptor, validate
from workers.runtime.families import describe
from workers.runtime.folding import Maps
from workers.runtime.plan import LETTERS, Action, PlanError, SkipPlan
from workers.tasks import Task

from .request import (
    PreparedRequest,
    RequestTimer,
    RequestTimes,
    cache_bytes,
    cache_of,
    device_name,
    prepare_request,
    run_request,
    time_request,
)

RUN = Action.RUN.letter
WARM_UP_REQUESTS = 3
PROFILE_SECONDS = 60.0
"""After which a profile repeats no more, if it has repeated ``LEAST_REPEATS`` times: long answers take long."""
LEAST_REPEATS = 3
CHECK_PLANS = 4
PAIRS_PER_LOOK = 10
LATE_PAIRS = 5
"""Fewest pairs an interval is made of when time is up."""
RESAMPLES = 2000


def profile_latency(
    loaded: LoadedModel,
    task: Task,
    *,
    actions: str = RUN + Action.SKIP.letter,
    repeats: int = 20,
    workload: Workload = DEFAULT_WORKLOAD,
    seed: int = 0,
) -> LatencyProfile:
    """Time every layer under every action, in prefill and in decoding.

    A layer's cost under run, freeze and bypass is timed by hooks around it, in a plan that gives that action to every
    layer that may take it; where a layer may not, its cost under run stands. A skipped layer is not executed and costs
    nothing. The additive prediction is then held against measured times of random check plans; its error is part of
    the profile. Repeats end early after ``PROFILE_SECONDS``.

    Raises:
        MeasurementError: unknown actions, no repeats, or other workers do not leave the device.
    """
    letters = _letters(actions)
    if repeats < 1:
        raise MeasurementError(f"repeats must be at least 1, not {repeats}")
    descriptor = describe(loaded.model)
    request = prepare_request(loaded, task, workload)
    checks = _check_plans(letters, descriptor, random.Random(seed))
    dense = SkipPlan.dense(descriptor.num_layers)
    hooked: dict[str, list[RequestTimes]] = {
        letter: [] for letter in letters if not Action.of(letter).row.removes_layer
    }
    times: dict[SkipPlan, list[float]] = {plan: [] for plan in (dense, *checks)}
    with device_lock.timing(*loaded.devices):
        with apply(loaded.model, dense):
            for _ in range(WARM_UP_REQUESTS):
                time_request(loaded, request)
        deadline = time.perf_counter() + PROFILE_SECONDS
        for repeat in range(repeats):
            if repeat >= LEAST_REPEATS and time.perf_counter() > deadline:
                break
            for letter, rows in hooked.items():
                uniform = _uniform_plan(letter, descriptor.allowed)
                with apply(loaded.model, uniform), RequestTimer.watching(loaded, descriptor.stack_path) as timer:
                    rows.append(timer.time(lambda: run_request(loaded, request)))
            for plan, measured in times.items():
                with apply(loaded.model, plan):
                    measured.append(time_request(loaded, request))
    dense_latency_seconds = statistics.median(times[dense])
    # The hooks may read another clock than the wall's (see RequestTimer): the dense request links the two.
    scale = dense_latency_seconds / statistics.median(row.total for row in hooked[RUN])
    prefill = {letter: _medians(rows, lambda calls: scale * calls[0]) for letter, rows in hooked.items()}
    decode = {letter: _medians(rows, lambda calls: scale * _per_token(calls)) for letter, rows in hooked.items()}
    for letter in letters:
        if letter not in hooked:
            for phase in (prefill, decode):
                runs = zip(descriptor.allowed, phase[RUN], strict=True)
                phase[letter] = tuple(0.0 if Action.of(letter) in allowed else seconds for allowed, seconds in runs)
    profile = LatencyProfile(
        device=device_name(*loaded.devices),
        workload=workload,
        prompt_tokens=request.prompt_tokens,
        dense_latency_seconds=dense_latency_seconds,
        dense_prefill_seconds=scale * statistics.median(row.model[0] for row in hooked[RUN]),
        dense_decode_seconds=scale * statistics.median(_per_token(row.model) for row in hooked[RUN]),
        prefill_seconds=prefill,
        decode_seconds=decode,
        relative_error=math.nan,
        failed_samples=request.failed_samples,
    )
    return replace(profile, relative_error=_error(profile, times, dense))


def _per_token(calls: Sequence[float]) -> float:
    """Mean seconds of the calls after the prefill; 0 where a request is a prefill alone."""
    return math.fsum(calls[1:]) / (len(calls) - 1) if len(calls) > 1 else 0.0


def _medians(rows: Sequence[RequestTimes], seconds: Callable[[Sequence[float]], float]) -> tuple[float, ...]:
    """Per layer the median over requests."""
    return tuple(statistics.median(map(seconds, layer)) for layer in zip(*(row.layers for row in rows), strict=True))


def _error(profile: LatencyProfile, times: dict[SkipPlan, list[float]], dense: SkipPlan) -> float:
    """Median relative error of the additive prediction over the check plans."""
    errors = []
    for plan, measured in times.items():
        if plan != dense or len(times) == 1:
            # Against the dense request of the same round: a busy machine drifts between rounds.
            ratio = statistics.median(mine / its for mine, its in zip(measured, times[dense], strict=True))
            errors.append(abs(predict_seconds(profile, plan) / (ratio * profile.dense_latency_seconds) - 1))
    return statistics.median(errors)


def predict_seconds(profile: LatencyProfile, plan: SkipPlan) -> float:
    """Additive prediction: dense minus what every layer saves under its action."""
    layers = profile.layer_seconds
    return profile.dense_latency_seconds - sum(
        layers[RUN][layer] - layers[action.letter][layer] for layer, action in enumerate(plan.actions)
    )


def compare_latency(
    loaded: LoadedModel, task: Task, request: CompareLatency, maps: Maps | None = None
) -> LatencyComparison:
    """Time a plan (with ``maps`` in the weights before its gaps) against dense, in pairs whose order alternates.

    Pairs are added until the bootstrap interval of the median ratio is narrower than ``precision`` times the ratio, or
    ``max_seconds`` have passed (five pairs at least).

    Raises:
        PlanError: the model cannot take the plan.
        MeasurementError: other workers do not leave the device.
    """
    with device_lock.timing(*loaded.devices):
        return _compare_alone(loaded, prepare_request(loaded, task, request.workload), request, maps)


def _compare_alone(
    loaded: LoadedModel, timed: PreparedRequest, request: CompareLatency, maps: Maps | None
) -> LatencyComparison:
    plan = SkipPlan.parse(request.plan)
    dense = SkipPlan.dense(len(plan))
    caches, peaks = [], []
    for candidate, folded in ((dense, None), (plan, maps)):
        with apply(loaded.model, candidate, folded):
            for _ in range(WARM_UP_REQUESTS):
                time_request(loaded, timed)
            caches.append(cache_bytes(cache_of(run_request(loaded, timed))))
            peaks.append(peak_bytes(lambda: run_request(loaded, timed), *loaded.devices))
    dense_times: list[float] = []
    plan_times: list[float] = []
    generator = np.random.default_rng(request.seed)
    deadline = time.perf_counter() + request.max_seconds
    while True:
        for takes_dense in (True, False) if len(dense_times) % 2 == 0 else (False, True):
            with apply(loaded.model, dense if takes_dense else plan, None if takes_dense else maps):
                (dense_times if takes_dense else plan_times).append(time_request(loaded, timed))
        pairs, late = len(dense_times), time.perf_counter() > deadline
        if pairs < (LATE_PAIRS if late else PAIRS_PER_LOOK) or (pairs % PAIRS_PER_LOOK and not late):
            continue
        ratios = [first / second for first, second in zip(dense_times, plan_times, strict=True)]
        low, high = median_interval(ratios, request.confidence, generator)
        if late or high - low <= request.precision * statistics.median(ratios):
            break
    return LatencyComparison(
        plan=plan.text,
        device=device_name(*loaded.devices),
        workload=request.workload,
        dense_latency_seconds=statistics.median(dense_times),
        latency_seconds=statistics.median(plan_times),
        speedup=statistics.median(ratios),
        speedup_low=low,
        speedup_high=high,
        pairs=pairs,
        dense_kv_cache_bytes=caches[0],
        kv_cache_bytes=caches[1],
        dense_peak_bytes=peaks[0],
        peak_bytes=peaks[1],
        failed_samples=timed.failed_samples,
    )


def median_interval(values: Sequence[float], confidence: float, generator: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979)."""
    data = np.asarray(values)
    medians = np.median(data[generator.integers(0, len(data), size=(RESAMPLES, len(data)))], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def _letters(actions: str) -> str:
    if not set(actions) <= set(LETTERS):
        raise MeasurementError(f"actions {actions!r}: allowed letters are {', '.join(LETTERS)}")
    return "".join(letter for letter in LETTERS if letter in actions or letter == RUN)


def _uniform_plan(letter: str, allowed: Sequence[frozenset[Action]]) -> SkipPlan:
    action = Action.of(letter)
    return SkipPlan(tuple(action if action in choices else Action.RUN for choices in allowed))


def _check_plans(letters: str, descriptor: FamilyDescriptor, generator: random.Random) -> list[SkipPlan]:
    """Random valid plans with a quarter to a half of the layers under another action than run."""
    plans: list[SkipPlan] = []
    layers = descriptor.num_layers
    for _ in range(CHECK_PLANS * 20):
        actions = [Action.RUN] * layers
        for layer in generator.sample(range(layers), generator.randint(max(1, layers // 4), max(1, layers // 2))):
            choices = [action for action in descriptor.allowed[layer] if action.letter in letters]
            actions[layer] = generator.choice(sorted(choices, key=lambda action: action.letter))
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
