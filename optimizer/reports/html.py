"""Write a job's report as one self-contained HTML file: style, script, plotly and data inside, nothing fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from optimizer.job.result import drafting_of, judging
from optimizer.reports import formatting, progress, provenance, sections, theory
from optimizer.reports.data import JobReport, collect
from optimizer.reports.formatting import Summary
from optimizer.reports.parts import Section
from optimizer.reports.progress import Step
from storage.database import Database
from storage.records import overview
from storage.records.engine_latencies import EngineLatency
from storage.records.plans import LOSSLESS, Plan


@dataclass(frozen=True)
class Page:
    """A page as its template needs it."""

    title: str
    kicker: str
    summary: Summary
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()
    """Figures large enough to be seen first, each with its label."""


def write_report(db: Database, job_id: int) -> str:
    """Return a job's report as HTML. Raises NotFound."""
    report = collect(db, job_id)
    return render(job_page(report, search_curves(db, report)))


def search_curves(db: Database, report: JobReport) -> list[tuple[str, tuple[Step, ...]]]:
    """Progress of this job's search, and of other jobs on the same model and task, under this job's corner.

    The others' plans are given this job's latency profile, so that all curves measure the same.
    """
    corner = progress.reference(report)
    curves = [(f"this job ({report.spec.strategy})", progress.steps(report.trials, corner))]
    if report.ids_scored is None or report.profile is None:
        return curves
    for other_id in overview.jobs_like(db, report.job.id, *report.ids_scored):
        other = collect(db, other_id, profile=report.profile)
        if other.scored_alike(report) and other.spec.mode == report.spec.mode:  # scores of another mode are others
            curves.append((f"job {other_id} ({other.spec.strategy})", progress.steps(other.trials, corner)))
    return curves


def job_page(report: JobReport, curves: Sequence[tuple[str, Sequence[Step]]]) -> Page:
    """Return the page of one job."""
    started = f", {report.job.started_at:%Y-%m-%d}" if report.job.started_at else ""
    return Page(
        title=f"Job {report.job.id}: {report.model_name} on {report.task_name}",
        kicker=f"skipplan, job {report.job.id}: {report.model_name} on {report.task_name}{started}",
        summary=formatting.summary(report),
        facts=() if report.best is None else facts(report.best),
        sections=(
            sections.drafting(report),
            sections.strips(report),
            sections.redundancy(report),
            provenance.section(report),
        )
        if report.spec.mode == LOSSLESS
        else (
            sections.front(report),
            sections.strips(report),
            sections.redundancy(report),
            sections.theory(theory.check(report)),
            sections.progress(report, curves),
            sections.breakdown(report),
            provenance.section(report),
        ),
    )


def facts(best: Plan) -> tuple[tuple[str, str], ...]:
    """Return the answer in four figures with their labels; intervals are not broken across lines."""
    served = judging(best)
    judged: Plan | EngineLatency = served or best
    where = "" if served is None else f" in {served.engine}"
    speedup = formatting.interval(judged.speedup_low, judged.speedup_high)
    difference = formatting.difference_interval(best)
    drafted = drafting_of(best)
    found = (
        (f"{judged.speedup:.2f}x", f"measured speed-up{where} {speedup}"),
        (formatting.signed(best.difference), f"points of accuracy{formatting.on_task(best)} {difference}")
        if drafted is None
        else (f"{drafted['acceptance']:.3f}", "of drafted positions accepted, answers unchanged"),
        (f"{best.layers_touched} of {len(best.plan)}", "layers touched"),
        (formatting.kv_cache(best), "of the dense KV cache"),
    )
    return tuple((value, label.replace(", ", ",\u00a0")) for value, label in found)


def render(page: Page, *, scripts: str | None = None) -> str:
    """Return the page as HTML: one file with everything in it, or with scripts and style at the path ``scripts``."""
    charts = [chart.to_json() for section in page.sections for chart in section.charts]
    source = files("optimizer.reports") / "page"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["marked"] = marked
    return environment.from_string((source / "report.html").read_text(encoding="utf-8")).render(
        page=page,
        version=version("skipplan"),
        scripts=scripts,
        css="" if scripts else (source / "report.css").read_text(encoding="utf-8"),
        script="" if scripts else (source / "report.js").read_text(encoding="utf-8"),
        plotly="" if scripts else plotly_script(),
        charts=embedded_json(charts),
    )


def marked(text: str) -> Markup:
    """Escaped text in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


@cache
def plotly_script() -> str:
    """Return plotly's own minified script, as its Python package ships it."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def embedded_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
