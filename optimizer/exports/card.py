"""The model card ``README.md``: measured numbers, how to use what was written, and the limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from optimizer.exports import guards
from optimizer.exports.document import PlanDocument
from optimizer.exports.interface import ExportFormat, Guide
from optimizer.job.result import Loss, losses
from storage.records.plans import LOSSLESS, MeasuredFigures
from workers.runtime import Action, SkipPlan

FILE_NAME = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(document: PlanDocument, chosen: ExportFormat, guide: Guide) -> str:
    """Return the card's text. ``document`` has its export part."""
    parts = [
        _front_matter(document, chosen),
        f"# {_inline(document.model.name)} under skip plan `{document.plan}`",
        _what(document),
        _origin(document),
        "## Measured",
        _table(document, chosen),
        "## Use",
        guide.usage,
        "## Limits",
        "\n".join(f"- {limit}" for limit in (*guide.limits, *_general_limits(document, chosen))),
        "## Made with",
        _made_with(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(document: PlanDocument, chosen: ExportFormat) -> str:
    fields: dict[str, Any] = {"pipeline_tag": "image-text-to-text", "tags": ["skipplan", "layer-skipping"]}
    if chosen.needs_model:
        fields["library_name"] = "openvino" if chosen.name == "openvino" else "transformers"
    if _HUB_ID.fullmatch(document.model.name):
        fields["base_model"] = document.model.name
    if _has_figures_of_its_own(document):
        fields["model-index"] = [_model_index(document)]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10_000)}---"


def _has_figures_of_its_own(document: PlanDocument) -> bool:
    """Whether what is written answers as was measured: not a drafter alone, nor a plan forced onto another model."""
    export = document.export
    forced = export is not None and export.model_fingerprint not in (None, document.model.fingerprint)
    return document.mode != LOSSLESS and not forced and "dense_warning" not in document.figures.secondary


def _model_index(document: PlanDocument) -> dict[str, Any]:
    """Return the held-out figures as the hub's metadata says them (model-index of the model card specification)."""
    own, name = document.figures, document.task.name
    level = own.secondary.get("difference_confidence", own.confidence)
    speedup = _metric(
        "speedup", f"speed-up on {document.device}", own.speedup, own.speedup_low, own.speedup_high, own.confidence
    )
    found = losses(own)
    if found:
        results = [_result_on(each, own.confidence, level) for each in found]
        results.append(_result(name, sum(each.n_samples for each in found if each.weight), [speedup]))
    else:
        accuracy = own.accuracy, own.accuracy_low, own.accuracy_high
        difference = own.difference, own.difference_low, own.difference_high
        metrics = [*_accuracy_metrics(accuracy, own.confidence, difference, level), speedup]
        results = [_result(name, own.n_samples, metrics)]
    return {"name": f"{document.model.name} under skip plan {document.plan}", "results": results}


def _result(
    dataset: str, samples: int, metrics: list[dict[str, Any]], task: str = "image-text-to-text"
) -> dict[str, Any]:
    return {
        "task": {"type": task},
        "dataset": {"type": dataset, "name": dataset, "split": "held-out", "args": {"samples": samples}},
        "metrics": metrics,
    }


def _result_on(each: Loss, confidence: float, level: float) -> dict[str, Any]:
    """Return what a plan lost on one of several tasks, or on text."""
    if each.is_text:
        name = "KL(dense || plan) of the next token, nats a token"
        metric = _metric("kl_divergence", name, each.loss, each.loss_low, each.loss_high, level)
        return _result(each.name, each.n_samples, [metric], "text-generation")
    accuracy = each.accuracy, each.accuracy_low, each.accuracy_high
    metrics = _accuracy_metrics(accuracy, confidence, _difference(each), level)
    return _result(each.name, each.n_samples, metrics)


def _difference(each: Loss) -> tuple[float, float, float]:
    """Return the difference of accuracy to dense with its interval's ends; no loss is no negative zero."""
    return 0.0 - each.loss, 0.0 - each.loss_high, 0.0 - each.loss_low


def _accuracy_metrics(
    accuracy: tuple[float, float, float], confidence: float, difference: tuple[float, float, float], level: float
) -> list[dict[str, Any]]:
    """Return accuracy and difference to dense, each given with its interval's ends."""
    return [
        _metric("accuracy", "accuracy", *accuracy, confidence),
        _metric("accuracy_difference", "accuracy less that of the dense model", *difference, level),
    ]


def _metric(kind: str, name: str, value: float, low: float, high: float, confidence: float) -> dict[str, Any]:
    interval = {"low": round(low, 6), "high": round(high, 6), "confidence": confidence}
    return {"type": kind, "name": f"{name} ({low:.4f} to {high:.4f})", "value": round(value, 6), "args": interval}


def _what(document: PlanDocument) -> str:
    plan = SkipPlan.parse(document.plan)
    model = document.model
    taken = [
        f"{len(plan.layers(action))} {action.row.meaning} ({action.letter}: {', '.join(map(str, plan.layers(action)))})"
        for action in Action
        if plan.layers(action) and action is not Action.RUN
    ]
    return (
        f"Of the {len(plan)} decoder layers of {_inline(model.name)} ({_inline(model.family)}, fingerprint "
        f"`{model.fingerprint[:16]}`), {'; '.join(taken) or 'all run'}. Compensation: {_inline(document.compensation)}."
    )


def _origin(document: PlanDocument) -> str:
    notes = []
    if document.mode == LOSSLESS:
        notes.append(
            "**This is a drafter.** The figures below hold where the dense model verifies its tokens (see "
            "`skipplan.json`, `figures.secondary.lossless`); alone it answers otherwise, and nothing "
            "is known of how well."
        )
    if document.origin == "imported":
        notes.append("**The figures below were imported, not measured by the installation that wrote this.**")
    warning = document.figures.secondary.get("dense_warning")
    if warning:
        notes.append(f"**The figures below are worth little: {_inline(str(warning))}.**")
    export = document.export
    if export is not None and export.model_fingerprint and export.model_fingerprint != document.model.fingerprint:
        notes.append(
            f"**The figures below are not of this model.** It was measured on `{document.model.fingerprint[:16]}` "
            f"and forced onto `{export.model_fingerprint[:16]}`, on which nothing was measured."
        )
    return "\n\n".join(notes)


def _table(document: PlanDocument, chosen: ExportFormat) -> str:
    own = document.figures
    confidence = f"{100 * own.confidence:g} %"
    own_confidence = own.secondary.get("difference_confidence")
    corrected = f" (at {100 * own_confidence:.4g} %)" if isinstance(own_confidence, float) else ""
    rows = [
        ("", "dense", "this plan", f"interval ({confidence})"),
        ("---", "---:", "---:", "---:"),
        *([row for each in losses(own) for row in _loss_rows(each, corrected)] or _accuracy_rows(own, corrected)),
        ("seconds a request", f"{own.dense_latency_seconds:.5f}", f"{own.latency_seconds:.5f}", ""),
        ("speed-up", "1", f"{own.speedup:.3f}", _interval(own.speedup_low, own.speedup_high, "{:.3f}")),
        ("KV cache, bytes", str(own.dense_kv_cache_bytes), str(own.kv_cache_bytes), ""),
    ]
    rows += [
        (
            f"speed-up in {_inline(each.engine)} {_inline(each.version)}, {each.concurrency} at once",
            "1",
            f"{each.speedup:.3f}",
            _interval(each.speedup_low, each.speedup_high, "{:.3f}"),
        )
        for each in own.engine_latencies
    ]
    rows += _guard_rows(own.secondary["guard"]) if _is_guarded(document, chosen) else []
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    task = f"Task{'s' if losses(own) else ''}: {_named(document)}"
    return (
        f"{table}\n\n{task} (held-out split, which the search never saw). "
        f"Device: {_inline(document.device)}. Workload: {_inline(document.workload)}."
    )


def _accuracy_rows(own: MeasuredFigures, corrected: str) -> list[tuple[str, str, str, str]]:
    return [
        (
            f"accuracy, {own.n_samples} held-out samples",
            f"{own.dense_accuracy:.4f}",
            f"{own.accuracy:.4f}",
            _interval(own.accuracy_low, own.accuracy_high, "{:.4f}"),
        ),
        (
            "difference to dense",
            "",
            f"{own.difference:+.4f}",
            _interval(own.difference_low, own.difference_high, "{:+.4f}") + corrected,
        ),
    ]


def _loss_rows(each: Loss, corrected: str) -> list[tuple[str, str, str, str]]:
    """Return what a plan lost on one of several tasks, or on text, with its limits."""
    name = _inline(each.name)
    if each.is_text:
        limit = "no limit" if each.max_loss is None else f"limit {each.max_loss:g}"
        title = f"KL(dense \\|\\| plan) on {name}, nats a token, {each.n_samples} held-out passages ({limit})"
        return [(title, "0", f"{each.loss:.4f}", _interval(each.loss_low, each.loss_high, "{:.4f}") + corrected)]
    difference, low, high = _difference(each)
    least = "" if each.min_accuracy is None else f" (at least {each.min_accuracy:g})"
    limit = "no limit" if each.max_loss is None else f"loss at most {each.max_loss:g}"
    return [
        (
            f"accuracy on {name}, {each.n_samples} held-out samples{least}",
            f"{each.dense_accuracy:.4f}",
            f"{each.accuracy:.4f}",
            _interval(each.accuracy_low, each.accuracy_high, "{:.4f}"),
        ),
        (
            f"difference to dense on {name} ({limit})",
            "",
            f"{difference:+.4f}",
            _interval(low, high, "{:+.4f}") + corrected,
        ),
    ]


def _named(document: PlanDocument) -> str:
    """Name the plan's task, or its tasks."""
    own = [each.name for each in losses(document.figures) if each.weight]
    return _inline(", ".join(own) or document.task.name)


def _is_guarded(document: PlanDocument, chosen: ExportFormat) -> bool:
    """Whether what is written asks the plan's guard before it answers."""
    return chosen.asks_guard and document.export is not None and guards.FILE_NAME in document.export.files


def _guard_rows(guard: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the shares that the plan's guard sends to the dense model, and the speed-up with it."""
    if "held_out" not in guard:
        return []
    elsewhere = {f"other task {name}": share for name, share in guard["tasks"].items()}
    elsewhere |= {"text": guard["text"]} if "text" in guard else {}
    rows = [
        (
            f"sent to dense by the guard, {_inline(name)}, {share['prompts']} prompts",
            "",
            f"{share['sent']:.4f}",
            _interval(share["low"], share["high"], "{:.4f}"),
        )
        for name, share in {"held-out": guard["held_out"], **elsewhere}.items()
        if share["prompts"]
    ]
    net = (
        [("speed-up with the guard, expected", "1", f"{guard['net_speedup']:.3f}", "")]
        if "net_speedup" in guard
        else []
    )
    return [*rows, *net]


def _interval(low: float, high: float, form: str) -> str:
    return f"{form.format(low)} to {form.format(high)}"


def _general_limits(document: PlanDocument, chosen: ExportFormat) -> list[str]:
    drafts = document.mode in chosen.drafts
    elsewhere = "more drafts may be refused, which costs time" if drafts else "its accuracy is unknown"
    unguarded = "Nothing here asks a guard, so prompts unlike the task's are answered with the plan too."
    answers_alone = not (drafts or document.mode == LOSSLESS)
    beside = [_inline(each.name) for each in losses(document.figures) if not each.weight]
    judged = f" and judged on {', '.join(beside)} beside" if beside else ""
    return [
        *([unguarded] if answers_alone and not _is_guarded(document, chosen) else []),
        f"The plan was chosen for {_named(document)}{judged}; on other tasks {elsewhere}.",
        "Speed was measured on the device and workload above; other hardware, batch sizes and answer lengths differ.",
        "The licence of the original model applies.",
    ]


def _made_with(document: PlanDocument) -> str:
    export = document.export
    assert export is not None
    versions = ", ".join(f"{name} {version}" for name, version in export.versions.items())
    return (
        f"Format `{export.format}`, written {export.created_at:%Y-%m-%d} with {versions}. Everything above is also "
        "in `skipplan.json`, in full; `skipplan verify-export` checks this directory against the live model."
    )


def _inline(text: str) -> str:
    """Text from elsewhere, without line breaks and with Markdown's and HTML's marks escaped."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
