"""Fit the guards of the finalists: which prompts are like the task's, so that the plan may answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext
from optimizer.stages.failed_samples import TooManyFailed
from optimizer.stages.verify import Chosen
from optimizer.statistics.intervals import wilson_interval
from workers.compensation import store
from workers.guard.needs import guard_layer, needed_prompts, too_few
from workers.messages import NO_COMPENSATION, Artifact, FitGuards, FittedGuards, LatencyComparison, SentAway


@dataclass(frozen=True)
class KeptGuard:
    """A guard's file, and what was measured of it on data that it was not fitted on."""

    artifact: Artifact
    layer: int
    """The decoder layer whose input it reads."""
    false_alarms: float
    """The rate that its threshold was set for."""
    fitted_on: int
    threshold_on: int
    held_out: SentAway
    """Of the task's own held-out images."""
    tasks: dict[str, SentAway]
    text: SentAway | None
    decision_seconds: float
    score_seconds: float

    def net_speedup(self, latency: LatencyComparison) -> float | None:
        """Return the expected speed-up on the task's own prompts: false alarms take the decision and dense behind it.

        Prompts that are admitted take the plan and the score, since its pass goes on behind the decision. None of
        batches, which one prompt outside sends to dense as a whole: decisions are timed, and prompts counted, singly.
        """
        if latency.workload.batch_size != 1:
            return None
        dense, sent = latency.dense_latency_seconds, self.held_out.share
        admitted = dense / latency.speedup + self.score_seconds
        return dense / ((1 - sent) * admitted + sent * (self.decision_seconds + dense))


@dataclass(frozen=True)
class Guards:
    """The guards of a job by the layer that they read, or why there are none."""

    by_layer: dict[int, KeptGuard] = field(default_factory=dict)
    note: str = ""


def run(context: JobContext, finalists: Sequence[Chosen]) -> Guards:
    """Fit a guard for every layer at which finalists need one, or read them back; a note where none can be fitted."""
    if context.spec.guard.false_alarms is None:
        return Guards()
    context.progress.begin("guard", 1)
    layers = tuple(sorted({layer_of(each.candidate) for each in finalists}))
    guards = context.load_or_compute("guard", Guards, partial(_fit, context, layers, context.spec.guard.false_alarms))
    context.progress.advance()
    return guards


def layer_of(candidate: Candidate) -> int:
    """Return the layer that a candidate's guard reads."""
    return guard_layer(candidate.plan, compensated=candidate.compensation != NO_COMPENSATION)


def _fit(context: JobContext, layers: tuple[int, ...], false_alarms: float) -> Guards:
    images = len({sample.image_key for sample in context.task.search})
    if images < needed_prompts(false_alarms):
        note = too_few(images, false_alarms)
        context.progress.note(f"no guard: {note}")
        return Guards(note=note)
    inputs = context.inputs
    request = FitGuards(layers, false_alarms, inputs.other_tasks, inputs.other_text, context.spec.collateral.samples)
    reply = context.ask_one(request, "the guard")
    if not isinstance(reply, FittedGuards):
        return Guards(note="it could not be fitted; the job's log says why")
    asked = {f"collateral {task.name}": task.held_out[: request.samples] for task in inputs.other_tasks}
    unmeasured = set()
    for split, reasons in reply.failed_samples.items():
        try:
            context.failed_samples.add(split, reasons, len(asked[split]) if split in asked else None)
        except TooManyFailed as error:
            if split not in asked:
                return Guards(note=str(error))
            context.progress.note(f"the guard on {split.partition(' ')[2]} is left out: {error}")
            unmeasured.add(split)
    return Guards(
        {
            each.layer: KeptGuard(
                artifact=store.put(context.spec.artifacts, each.content),
                false_alarms=false_alarms,
                tasks={name: sent for name, sent in each.tasks.items() if f"collateral {name}" not in unmeasured},
                **{name: getattr(each, name) for name in _MEASURED},
            )
            for each in reply.guards
        }
    )


_MEASURED = (
    "layer",
    "fitted_on",
    "threshold_on",
    "held_out",
    "text",
    "decision_seconds",
    "score_seconds",
)


def figures(
    guards: Guards, candidate: Candidate, latency: LatencyComparison, confidence: float
) -> Mapping[str, object]:
    """Return what is published of a plan's guard; only a note where there is none, nothing where none was asked for."""
    kept = guards.by_layer.get(layer_of(candidate))
    if kept is None:
        return {"note": guards.note} if guards.note else {}
    net_speedup = kept.net_speedup(latency)
    return {
        "artifact": kept.artifact.location,
        "checksum": kept.artifact.checksum,
        "layer": kept.layer,
        "false_alarms": kept.false_alarms,
        "fitted_on": kept.fitted_on,
        "threshold_on": kept.threshold_on,
        "held_out": _share(kept.held_out, confidence),
        "tasks": {name: _share(sent, confidence) for name, sent in kept.tasks.items()},
        **({} if kept.text is None else {"text": _share(kept.text, confidence)}),
        "decision_seconds": kept.decision_seconds,
        "score_seconds": kept.score_seconds,
        **({} if net_speedup is None else {"net_speedup": net_speedup}),
    }


def _share(sent: SentAway, confidence: float) -> Mapping[str, object]:
    """Return the share sent to the dense model, with Wilson's interval; prompts are one an image."""
    if not sent.prompts:
        return {"prompts": 0}
    interval = wilson_interval(sent.share, sent.prompts, confidence)
    return {"prompts": sent.prompts, "sent": sent.share, "low": interval.low, "high": interval.high}
