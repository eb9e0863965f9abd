"""Fit the guards of a task, and measure what they send away and what asking them costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from workers.device import lock as device_lock
from workers.errors import MeasurementError
from workers.latency.request import synchronise
from workers.messages import FitGuards, FittedGuard, FittedGuards, SentAway
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.runtime.guard import Guard
from workers.tasks import Sample, Task

from .artifact import encode
from .fit import conformal_threshold, fit_gaussian
from .states import asking_text, one_per_image, task_features

MOST_FITTED, MOST_THRESHOLD, MOST_COUNTED = 256, 512, 400
"""Most images that the distribution is fitted on, that the threshold comes from, and that alarms are counted on."""
TIMED = 5


def fit_guards(loaded: LoadedModel, task: Task, request: FitGuards) -> FittedGuards:
    """Fit a guard at every layer asked for: on calibration images, with a threshold from search images.

    Both splits are apart from the held-out one, on which false alarms are counted. What is timed has the device alone.
    Raises MeasurementError where the search split has too few images for the rate, or others keep using the device.
    """
    failed: dict[str, dict[str, str]] = {}

    def features(name: str, asked: Task, samples: Sequence[Sample]) -> dict[int, Tensor]:
        found, failed[name] = task_features(loaded, asked, samples, request.layers)
        return found

    with device_lock.computing(*loaded.devices):
        fitted_on = features("calibration", task, one_per_image(task.calibration, MOST_FITTED, parts=task.parts))
        threshold_on = features("search", task, one_per_image(task.search, MOST_THRESHOLD, parts=task.parts))
        held_out = one_per_image(task.held_out, MOST_COUNTED, parts=task.parts)
        own = features("held_out", task, held_out)
        others = {
            each.name: features(f"collateral {each.name}", each, one_per_image(each.held_out[: request.samples]))
            for each in request.tasks
        }
        text = None
        if request.text is not None:
            asked = asking_text(task, held_out[: request.samples], request.text)
            text, _ = task_features(loaded, *asked, request.layers)
    guards = []
    for layer in request.layers:
        gaussian = fit_gaussian(fitted_on[layer])
        unset = Guard(
            model_fingerprint=loaded.fingerprint,
            layer=layer,
            **vars(gaussian),
            threshold=0.0,
            false_alarms=request.false_alarms,
            fitted_on=len(fitted_on[layer]),
            threshold_on=len(threshold_on[layer]),
        )
        threshold = conformal_threshold(unset.score(threshold_on[layer]), request.false_alarms)
        guard = replace(unset, threshold=threshold)
        with device_lock.timing(*loaded.devices):
            decision, score = _seconds(loaded, task, guard, own[layer])
        guards.append(
            FittedGuard(
                layer=layer,
                content=encode(guard),
                fitted_on=guard.fitted_on,
                threshold_on=guard.threshold_on,
                held_out=_sent_away(guard, own[layer]),
                tasks={name: _sent_away(guard, found[layer]) for name, found in others.items()},
                text=None if text is None else _sent_away(guard, text[layer]),
                decision_seconds=decision,
                score_seconds=score,
            )
        )
    return FittedGuards(tuple(guards), {name: reasons for name, reasons in failed.items() if reasons})


def _sent_away(guard: Guard, features: Tensor) -> SentAway:
    return SentAway(len(features), int((~guard.inside(features)).sum()))


def _seconds(loaded: LoadedModel, task: Task, guard: Guard, features: Tensor) -> tuple[float, float]:
    """Return median seconds of one prompt: from its inputs to the decision, and of the score alone."""
    for sample in task.calibration:
        batch = prepare_batch(loaded, task, [sample])
        if batch.inputs is not None:
            break
    else:
        raise MeasurementError(f"task {task.name}: no calibration sample can be read")
    inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
    one = features[:1].to(loaded.device)
    decisions, scores = [], []
    for _ in range(TIMED + 1):
        synchronise(*loaded.devices)
        started = time.perf_counter()
        guard.admits(loaded.model, **inputs)
        synchronise(*loaded.devices)
        between = time.perf_counter()
        guard.inside(one).tolist()
        decisions.append(between - started)
        scores.append(time.perf_counter() - between)
    return statistics.median(decisions[1:]), statistics.median(scores[1:])
