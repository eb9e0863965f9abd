"""Time dense passes over several new tokens, as verifying a draft makes them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin

from workers.device import lock as device_lock
from workers.errors import MeasurementError
from workers.evaluation.acceptance import LONGEST_SCORED_DRAFT
from workers.latency.measure import LEAST_REPEATS, PROFILE_SECONDS
from workers.latency.request import prepare_request, synchronise
from workers.layerwise.hooks import Hooks
from workers.messages import (
    LatencyProfile,
)
from workers.models.loading import LoadedModel
from workers.runtime import speculate
from workers.runtime.descriptor import FamilyDescriptor, validate
from workers.runtime.families import describe
from workers.runtime.plan import Action, PlanError, SkipPlan
from workers.tasks import Task

from .request import generate

WIDTHS = (1, 2, 3, 5, LONGEST_SCORED_DRAFT + 1)
"""New tokens of the passes that are timed; between them a straight line is taken."""


def verify_seconds(loaded: LoadedModel, task: Task, profile: LatencyProfile, repeats: int) -> tuple[float, ...]:
    """Time dense passes over 1 to ``LONGEST_SCORED_DRAFT + 1`` new tokens, as speculation makes them.

    Every width is timed in turns with a plain step, and is that many times as long as the profile's.

    Raises:
        MeasurementError: other workers do not leave the device.
        UnsupportedFamilyError: the model's cache cannot be set back.
    """
    request = prepare_request(loaded, task, profile.workload)
    plan = _cheap_drafter(describe(loaded.model))
    ratios: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with device_lock.timing(*loaded.devices):
        _timed_passes(loaded, plan, 2, request.inputs)
        deadline = time.perf_counter() + PROFILE_SECONDS
        for repeat in range(max(1, repeats // 2)):  # a repeat times several passes of every width
            if repeat >= LEAST_REPEATS and time.perf_counter() > deadline:
                break
            step = statistics.median(_timed_passes(loaded, plan, 1, request.inputs))
            for width in WIDTHS[1:]:
                ratios[width].append(statistics.median(_timed_passes(loaded, plan, width, request.inputs)) / step)
    known = np.maximum.accumulate(
        [1.0, *(statistics.median(ratios[width]) for width in WIDTHS[1:])]
    )  # what says that more tokens take less time is noise
    widths = np.arange(1, LONGEST_SCORED_DRAFT + 2)
    return tuple((profile.dense_decode_seconds * np.interp(widths, WIDTHS, known)).tolist())


def _timed_passes(loaded: LoadedModel, plan: SkipPlan, width: int, inputs: Mapping[str, Any]) -> list[float]:
    """Return the seconds of the dense model's passes over ``width`` new tokens in one request."""
    model, devices = loaded.model, loaded.devices
    starts: list[tuple[int, float]] = []
    seconds: dict[int, list[float]] = defaultdict(list)

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        synchronise(*devices)
        ids = kwargs.get("input_ids")
        starts.append((0 if ids is None else int(ids.shape[1]), time.perf_counter()))

    def after(output: object) -> None:
        synchronise(*devices)
        asked, start = starts.pop()
        seconds[asked].append(time.perf_counter() - start)

    with Hooks() as hooks, torch.inference_mode():
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                hooks.before(module, before)
                hooks.after(module, after)
        tokens = {"min_new_tokens": width + 4, "max_new_tokens": width + 4}
        if width == 1:
            generate(loaded, model, inputs, **tokens)
        else:
            with speculate(model, plan, draft_length=width - 1) as speculation:
                generate(loaded, speculation, inputs, **tokens)
    if not seconds[width]:
        raise MeasurementError(f"no pass over {width} new tokens was made; the model takes no token ids")
    return seconds[width]


def _cheap_drafter(descriptor: FamilyDescriptor) -> SkipPlan:
    """Return a plan that leaves little of the model: what it drafts does not matter."""
    skipping = [layer for layer, allowed in enumerate(descriptor.allowed) if Action.SKIP in allowed]
    for layers in (skipping[1:], skipping[:1]):
        plan = SkipPlan.dense(descriptor.num_layers)
        for layer in layers:
            plan = plan.with_action(layer, Action.SKIP)
        try:
            validate(plan, descriptor)
        except PlanError:
            continue
        return plan
    raise MeasurementError("no layer of the model can be skipped, so nothing can draft for it")
