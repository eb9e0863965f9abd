"""Write a page that compares two jobs: limits, results, fronts and searches on common axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from optimizer.job.result import losses
from optimizer.reports import figures, formatting, progress, sections
from optimizer.reports.chart import SERIES, Chart, axis
from optimizer.reports.data import JobReport, collect
from optimizer.reports.formatting import Summary
from optimizer.reports.html import Page, render
from optimizer.reports.parts import Section, Table
from storage.database import Database
from storage.records.plans import Plan


def write_comparison(db: Database, first: int, second: int) -> str:
    """Two jobs as one HTML page. Raises NotFound."""
    return render(comparison_page(db, collect(db, first), collect(db, second)))


def comparison_page(db: Database, first: JobReport, second: JobReport) -> Page:
    """Return the page; charts that need the same model and task are left out, with the reason, where they differ."""
    headline = " and ".join(f"job {each.job.id}: {formatting.short_answer(each)}" for each in (first, second))
    return Page(
        title=f"job {first.job.id} and job {second.job.id}",
        kicker="skipplan, two jobs compared",
        summary=Summary(headline, (comparability(first, second),), "open"),
        sections=(
            Section("figures", "Figures", "Figures side by side", tables=(figures_table(first, second),)),
            _fronts(first, second),
            _strips(first, second),
            _searches(db, first, second),
        ),
    )


def comparability(first: JobReport, second: JobReport) -> str:
    """Say in a sentence what of two jobs can be compared."""
    if first.ids is None or second.ids is None:
        return "At least one of these jobs has not loaded its model yet; there is little to compare."
    if not first.scored_alike(second):
        judged = "" if first.spec.goals == second.spec.goals else ", or in the losses and limits that they judge by"
        return (
            f"These jobs differ in their model, their task or its samples{judged}: compare what is relative "
            "to each one's own dense model, not accuracies."
        )
    devices = {report.profile.device for report in (first, second) if report.profile is not None}
    if len(devices) > 1:
        return f"Same model, task and samples, but each its device ({', '.join(sorted(devices))})."
    return "Same model, task and samples, same device."


def _of_profile(name: str) -> Callable[[JobReport], str]:
    return lambda report: formatting.NOT_MEASURED if report.profile is None else getattr(report.profile, name)


def _of_best(value: Callable[[Plan], str]) -> Callable[[JobReport], str]:
    return lambda report: "none" if report.best is None else value(report.best)


_FIGURES: tuple[tuple[str, Callable[[JobReport], str]], ...] = (
    ("state", lambda report: report.job.state),
    ("model", lambda report: report.model_name),
    ("task", lambda report: report.task_name),
    ("device", _of_profile("device")),
    ("workload", _of_profile("workload")),
    ("limits", lambda report: "; ".join(formatting.constraint(report))),
    ("search", lambda report: report.spec.strategy),
    ("best plan", _of_best(lambda plan: formatting.layers(plan.plan))),
    ("speed-up, measured", _of_best(formatting.speedup)),
    ("difference, points", _of_best(formatting.difference)),
    (
        "accuracy",
        _of_best(
            lambda p: f"{p.accuracy:.3f} (dense {p.dense_accuracy:.3f}, n = {p.n_samples:,}){formatting.on_task(p)}"
        ),
    ),
    ("all losses", _of_best(lambda plan: "; ".join(map(formatting.loss, losses(plan))) or "this one")),
    ("a request", _of_best(formatting.request)),
    ("KV cache", _of_best(formatting.kv_cache)),
    ("compensation", _of_best(lambda plan: plan.compensation)),
    ("plans tried", lambda report: f"{len(report.trials):,}, {report.num_complete:,} on the whole search split"),
    ("plans verified", lambda report: f"{len(report.plans)}, {report.num_meeting} within the limits"),
)


def figures_table(*reports: JobReport) -> Table:
    """Return the figures of jobs side by side, one row a figure, one column a job behind its name."""
    header = ("", *(f"job {report.job.id}" for report in reports))
    rows = tuple((name, *(value(report) for report in reports)) for name, value in _FIGURES)
    return Table("All figures", header, rows, open=True)


def _fronts(first: JobReport, second: JobReport) -> Section:
    section = Section("front", "Fronts", "Both fronts")
    traces: list[dict[str, Any]] = []
    for number, report in enumerate((first, second)):
        chart = figures.front(report)
        traces += [
            _in_colour(trace, SERIES[number], f"job {report.job.id}, {trace['name']}")
            for trace in (chart.traces if chart is not None else ())
            if trace["name"].startswith("verified")
        ]
    if not traces:
        return replace(section, paragraphs=("Neither job has verified a plan.",))
    layout = {"xaxis": axis("speed-up (dense = 1)"), "yaxis": axis("difference to dense, points")}
    chart = Chart("front", tuple(traces), layout, 440, "Verified plans of both jobs with their intervals.")
    text = "Plans verified on held-out samples, with intervals; hollow ones break a limit of their own job."
    return replace(section, paragraphs=(text,), charts=(chart,))


def _in_colour(trace: dict[str, Any], colour: str, name: str) -> dict[str, Any]:
    hollow = "outside" in trace["name"]
    marker = {**trace["marker"], "color": colour, "symbol": "diamond-open" if hollow else "diamond"}
    marker.pop("line")
    errors = {axis: {**trace[axis], "color": colour} for axis in ("error_x", "error_y")}
    return {**trace, **errors, "name": name, "marker": marker}


def _strips(first: JobReport, second: JobReport) -> Section:
    parts = [sections.strips(report) for report in (first, second)]
    groups = tuple(
        replace(group, title=f"Job {report.job.id}: {group.title[:1].lower()}{group.title[1:]}")
        for report, part in zip((first, second), parts, strict=True)
        for group in part.strips
    )
    legend = tuple(dict.fromkeys(entry for part in parts for entry in part.legend))
    return Section("plans", "Plans", "The plans, layer by layer", legend=legend, strips=groups)


def _searches(db: Database, first: JobReport, second: JobReport) -> Section:
    section = Section("progress", "Search", "Both searches")
    if not first.scored_alike(second):
        text = "The searches cannot be compared: model, task, samples or what they judge by differ."
        return replace(section, paragraphs=(text,))
    corner = progress.reference(first)
    again = collect(db, second.job.id, profile=first.profile) if first.profile is not None else second
    curves = [
        (f"job {report.job.id} ({report.spec.strategy})", progress.steps(report.trials, corner))
        for report in (first, again)
    ]
    return replace(sections.progress(first, curves), title=section.title)
