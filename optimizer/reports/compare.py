"""Write a page that compares two jobs: limits, results, fronts and searches on common axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from optimizer.reports import figures, formatting, progress, sections
from optimizer.reports.chart import SERIES, Chart, axis
from optimizer.reports.data import JobReport, collect, meets_constraint
from optimizer.reports.html import Page, render
from optimizer.reports.sections import Section, Table
from storage.database import Database
from storage.records.plans import Plan


def write_comparison(db: Database, first: int, second: int) -> str:
    """Two jobs as one HTML page. Raises NotFound."""
    return render(comparison_page(db, collect(db, first), collect(db, second)))


def comparison_page(db: Database, first: JobReport, second: JobReport) -> Page:
    """The page; charts that need the same model and task are left out, with the reason, where they differ."""
    pair = (first, second)
    names = [f"job {report.job.id}" for report in pair]
    return Page(
        title=f"{names[0]} and {names[1]}",
        kicker="skipplan, two jobs compared",
        headline=" and ".join(
            f"{name}: {formatting.short_answer(each)}" for name, each in zip(names, pair, strict=True)
        ),
        tone="open",
        facts=(),
        sentences=(_comparability(first, second),),
        sections=(
            Section("figures", "Figures", "Figures side by side", tables=(_figures(first, second),)),
            _fronts(first, second),
            _strips(first, second),
            _searches(db, first, second),
        ),
    )


def _comparable(first: JobReport, second: JobReport) -> bool:
    """Whether both jobs scored the same model on the same search samples."""
    splits = [report.split_hashes.get("search") for report in (first, second)]
    return first.ids is not None and first.ids == second.ids and splits[0] == splits[1]


def _comparability(first: JobReport, second: JobReport) -> str:
    if first.ids is None or second.ids is None:
        return "At least one of these jobs has not loaded its model yet; there is little to compare."
    if not _comparable(first, second):
        return (
            "These jobs differ in their model, their task or its samples: compare what is relative to each one's own "
            "dense model, not accuracies."
        )
    devices = {report.profile.device for report in (first, second) if report.profile is not None}
    if len(devices) > 1:
        return f"Same model, task and samples, but each its device ({', '.join(sorted(devices))})."
    return "Same model, task and samples, same device."


def _figures(first: JobReport, second: JobReport) -> Table:
    columns = [dict(_column(report)) for report in (first, second)]
    rows = tuple((name, *(column[name] for column in columns)) for name in columns[0])
    return Table("All figures", ("", f"job {first.job.id}", f"job {second.job.id}"), rows, open=True)


def _column(report: JobReport) -> list[tuple[str, str]]:
    kept = sum(meets_constraint(plan) is True for plan in report.plans)
    complete = sum(each.complete for each in report.trials)
    profile = report.profile
    return [
        ("state", report.job.state),
        ("model", report.model_name),
        ("task", report.task_name),
        ("device", profile.device if profile else formatting.NOT_MEASURED),
        ("workload", profile.workload if profile else formatting.NOT_MEASURED),
        ("limits", "; ".join(formatting.constraint(report))),
        ("search", report.spec.strategy),
        *_best(report.best),
        ("plans tried", f"{len(report.trials):,}, {complete:,} on the whole search split"),
        ("plans verified", f"{len(report.plans)}, {kept} within the limits"),
    ]


def _best(best: Plan | None) -> list[tuple[str, str]]:
    def shown(value: Callable[[Plan], str]) -> str:
        return "none" if best is None else value(best)

    milliseconds = formatting.milliseconds
    return [
        ("best plan", shown(lambda plan: formatting.layers(plan.plan))),
        ("speed-up, measured", shown(formatting.speedup)),
        ("difference, points", shown(formatting.difference)),
        ("accuracy", shown(lambda plan: f"{plan.accuracy:.3f} (dense {plan.dense_accuracy:.3f}, n = {plan.n:,})")),
        ("a request", shown(lambda p: f"{milliseconds(p.seconds)} (dense {milliseconds(p.dense_seconds)})")),
        ("KV cache", shown(lambda plan: formatting.share(plan.kv_cache_bytes, plan.dense_kv_cache_bytes))),
        ("compensation", shown(lambda plan: plan.compensation)),
    ]


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
    if not _comparable(first, second):
        return replace(section, paragraphs=("The searches cannot be compared: model, task or samples differ.",))
    corner = progress.reference(first)
    again = collect(db, second.job.id, profile=first.profile) if first.profile is not None else second
    curves = [
        (f"job {report.job.id} ({report.spec.strategy})", progress.steps(report.trials, corner))
        for report in (first, again)
    ]
    return replace(sections.progress(first, curves), title=section.title)
