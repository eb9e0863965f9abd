"""Trace a report's figures: versions, hashes, seeds, times, the specification, the command to repeat the job."""

from __future__ import annotations

from importlib.metadata import version

import yaml

from optimizer.job.result import shown_spec
from optimizer.reports.data import JobReport
from optimizer.reports.formatting import NOT_MEASURED, count, duration, share
from optimizer.reports.parts import Section, Table
from optimizer.stages.failed_samples import recorded


def section(report: JobReport) -> Section:
    """Everything that names the inputs and the circumstances of a job."""
    rows = [*_about_the_job(report), *_about_the_model(report), *_about_the_task(report), *_about_the_work(report)]
    history = tuple(
        (f"{event.at:%Y-%m-%d %H:%M:%S}", str(event.attempt), event.kind.replace("_", " "), event.message)
        for event in report.events
    )
    tables = [Table("Versions, hashes and seeds", ("what", "value"), tuple(rows), open=True)]
    if report.failed:
        title = f"Plans that could not be scored ({len(report.failed)})"
        tables.append(Table(title, ("plan", "reason"), report.failed))
    marked = recorded(list(report.events))
    if marked:
        title = f"Samples that failed and were left out ({len(marked)})"
        tables.append(Table(title, ("split", "sample", "reason"), tuple(marked), open=True))
    tables.append(Table(f"History ({len(history)})", ("when, UTC", "attempt", "what", "detail"), history, (1,)))
    specification = yaml.safe_dump(shown_spec(report.job.spec), sort_keys=False, allow_unicode=True)
    return Section(
        "provenance",
        "Provenance",
        "Where these figures come from",
        paragraphs=(
            "Save the specification below as job.yaml and run `skipplan run job.yaml` to repeat the job. The search is "
            "deterministic for equal measurements; measured latencies differ from run to run, and with them the plans.",
        ),
        tables=tuple(tables),
        texts=(("Specification (job.yaml)", specification),),
    )


def _about_the_job(report: JobReport) -> list[tuple[str, str]]:
    job = report.job
    rows = [
        ("job", f"{job.id}, {job.state}, attempt {job.attempt}"),
        ("specification (SHA-256)", job.spec_hash),
        ("submitted", f"{job.created_at:%Y-%m-%d %H:%M:%S} UTC"),
    ]
    if job.started_at is not None and job.finished_at is not None:
        taken = duration((job.finished_at - job.started_at).total_seconds())
        rows.append(("ran", f"{job.started_at:%Y-%m-%d %H:%M:%S} to {job.finished_at:%Y-%m-%d %H:%M:%S} UTC, {taken}"))
    return [*rows, ("command", "skipplan run job.yaml"), ("report written by", f"skipplan {version('skipplan')}")]


def _about_the_model(report: JobReport) -> list[tuple[str, str]]:
    spec = report.spec
    rows = [("model", spec.model + (f" at revision {spec.revision}" if spec.revision else ""))]
    if report.model is None:
        return [*rows, ("model fingerprint", NOT_MEASURED)]
    model = report.model
    return [
        *rows,
        ("model fingerprint (SHA-256)", model.fingerprint),
        ("family, layers, parameters", f"{model.family}, {model.num_layers}, {count(model.parameters)}"),
    ]


def _about_the_task(report: JobReport) -> list[tuple[str, str]]:
    rows = [("task", report.spec.task)]
    task = report.task
    if task is not None:
        sizes = f"{task.calibration_size}, {task.search_size}, {task.held_out_size}"
        rows += [
            ("task data, prompt and metric (SHA-256)", task.task_hash),
            ("calibration, search, held-out samples", sizes),
            ("seed of the splits", str(task.split_seed)),
        ]
    several = len({task for task, _ in report.split_hashes}) > 1
    return rows + [
        (f"{f'{task}, ' if several else ''}{split.replace('_', '-')} split (SHA-256)", value)
        for (task, split), value in report.split_hashes.items()
    ]


def _about_the_work(report: JobReport) -> list[tuple[str, str]]:
    counters = report.counters
    rows = [
        ("search", report.spec.strategy),
        ("settings of the evaluations", report.settings or NOT_MEASURED),
        ("device", report.profile.device if report.profile else NOT_MEASURED),
        ("evaluations stored", f"{count(report.evaluations)}, {count(report.reused)} of them reused"),
    ]
    if "samples" in counters:
        rows.append(("samples evaluated", count(counters["samples"])))
        failed = count(counters.get("failed_samples", 0.0))
        rows.append(("of those, failed (image, processor, NaN, memory)", failed))
        rows.append(("of those, decided alone since rounding could decide", count(counters.get("near_ties", 0.0))))
    if "evaluation_seconds" in counters:
        rows.append(("worker time of the evaluations", duration(counters["evaluation_seconds"])))
    return [*rows, ("layer executions", _layer_executions(report))]


def _layer_executions(report: JobReport) -> str:
    if not report.layer_executions:
        return NOT_MEASURED
    saved = report.layer_executions_saved
    fewer = share(saved, report.layer_executions + saved)
    return f"{count(report.layer_executions)}; {fewer} fewer than one plan after another"
