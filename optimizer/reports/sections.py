"""Lay out the parts of a report's page as plain values: paragraphs, strips, charts and tables, in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from optimizer.job.result import drafting_of, losses
from optimizer.reports import figures, formatting, latency
from optimizer.reports.chart import Chart
from optimizer.reports.columns import (
    DRAFT_TRIAL_COLUMNS,
    DRAFTED_COLUMNS,
    ENGINE_COLUMNS,
    GUARD_COLUMNS,
    LOSS_COLUMNS,
    MEASUREMENT_COLUMNS,
    OFF_TASK_COLUMNS,
    PLAN_COLUMNS,
    STEP_COLUMNS,
    TRIAL_COLUMNS,
    drafted,
    known,
    of_drafter,
)
from optimizer.reports.data import JobReport, TrialSummary
from optimizer.reports.heights import allowed_loss, is_mean
from optimizer.reports.parts import Column, Section, StripRow, Strips, Table
from optimizer.reports.progress import Step, reference
from optimizer.reports.theory import TheoryCheck
from optimizer.search.goals import LEAST_LIMIT, Goals
from optimizer.statistics.rank_agreement import Agreement
from storage.records.plans import Plan
from workers.runtime.plan import Action

STRIPS_SHOWN = 12
TRIALS_SHOWN = 100


def front(report: JobReport) -> Section:
    """Show the Pareto front."""
    chart = figures.front(report)
    section = Section("front", "Front", "What was tried, and the front")
    if chart is None:
        return replace(section, paragraphs=(f"Front: {formatting.NOT_MEASURED} yet{_awaited(report)}.",))
    paragraphs = [
        "Diamonds are plans verified on held-out samples, with intervals and with speed-ups measured against the dense "
        "model. Dots are plans as the search saw them: accuracy on the search split, speed-up predicted from the "
        "latency profile; they steer the search and are never published. Grey ones break a limit of the job or were "
        "given up early. Point at a plan, or tap it, to see its layers.",
        f"Limits of the job: {'; '.join(formatting.constraint(report))}.",
    ]
    if report.spec.goals is not None:
        paragraphs.append(_several_losses(report.spec.goals))
    elif report.spec.allowed_loss is not None:
        paragraphs[1] += " The dotted line is the allowed loss; a verified plan's whole interval has to lie above it."
    if report.awaits_trials:
        paragraphs.append(f"Plans tried are not shown{_awaited(report)}.")
    below = _below(report, chart)
    if below:
        number = formatting.count(below)
        paragraphs.append(f"{number} of the dots lie below the range shown; the table holds the best of them.")
    guarded = [plan for plan in report.plans if "checksum" in plan.secondary.get("guard", {})]
    guards = (Table.of(f"Guards ({len(guarded)})", guarded, GUARD_COLUMNS),) if guarded else ()
    paragraphs += _guard_notes(report.plans)
    tables = (_plans_table(report), *_losses_table(report), *guards, _trials_table(report.trials))
    return replace(section, paragraphs=tuple(paragraphs), charts=(chart,), tables=tables)


def _several_losses(goals: Goals) -> str:
    """Say what heights are of where plans are judged by several losses, and what the dotted line is."""
    allowed = allowed_loss(goals)
    if not is_mean(goals):
        return (
            "This job judges plans by several losses. Heights are of the loss that is the largest share of its limit, "
            f"scaled to the least limit of accuracy, {formatting.limit(goals.unit)} (limits below "
            f"{formatting.limit(LEAST_LIMIT)} count as so much), which is the dotted line. Judged is each loss by "
            "itself; the table has them."
        )
    line = "" if allowed is None else "; a plan below the dotted line, the mean of their limits, breaks one of them"
    return (
        "This job judges plans by several losses. Heights are the weighted mean of the losses on its tasks, of "
        "verified plans between the means of their intervals' ends, which is wider than the mean's own interval. "
        f"Judged is each loss by itself{line}; the table has them."
    )


def _awaited(report: JobReport) -> str:
    """Say why plans tried are missing where that is for the search not having ended."""
    return ": what was tried by several losses is known once the search has ended" if report.awaits_trials else ""


def drafting(report: JobReport) -> Section:
    """Show what plans are worth as drafters, and what was tried."""
    section = Section("drafting", "Drafting", "What the drafts are worth")
    paragraphs = (
        "The plan drafts, the dense model verifies every token: answers stay the dense model's. Acceptance is the "
        "share of the positions of its own answers at which the plan's next token is its next token. Speed-ups were "
        "measured in alternating pairs with dense on held-out prompts; behind the first token, decoding alone counts. "
        "Times of plans tried are expected from their acceptance and the latency profile, and are never published.",
        f"Limits of the job: {'; '.join(formatting.constraint(report))}.",
    )
    chosen = tuple(row for row, plan in enumerate(report.plans) if report.is_answer(plan))
    measured = Table.of(f"Verified plans ({len(report.plans)})", report.plans, DRAFTED_COLUMNS)
    tables = [replace(measured, chosen=chosen, open=True)]
    rows = [
        (plan, name, figures_of)
        for plan in report.plans
        for name, figures_of in ((drafting_of(plan) or {}).get("off_task") or {}).items()
    ]
    if rows:
        tables.append(Table.of(f"Beside the task ({len(rows)})", rows, OFF_TASK_COLUMNS))
    ordered = sorted(report.trials, key=lambda each: 2.0 if each.drafter is None else each.drafter.time)
    shown = f"the first {TRIALS_SHOWN} of {len(ordered):,}" if len(ordered) > TRIALS_SHOWN else f"{len(ordered)}"
    tables.append(Table.of(f"Plans tried ({shown})", ordered[:TRIALS_SHOWN], DRAFT_TRIAL_COLUMNS))
    chart = figures.drafting(report)
    return replace(section, paragraphs=paragraphs, charts=() if chart is None else (chart,), tables=tuple(tables))


def _guard_notes(plans: Sequence[Plan]) -> list[str]:
    """Say why plans have no guard."""
    notes = dict.fromkeys(plan.secondary.get("guard", {}).get("note", "") for plan in plans)
    return [f"The plans have no guard: {note}." for note in notes if note]


def _losses_table(report: JobReport) -> tuple[Table, ...]:
    """Show every loss of every plan, where the job judges by several."""
    rows = [(plan, each) for plan in report.plans for each in losses(plan)]
    return (replace(Table.of(f"Losses held-out ({len(rows)})", rows, LOSS_COLUMNS), open=True),) if rows else ()


def _below(report: JobReport, chart: Chart) -> int:
    shown = chart.layout["yaxis"]["range"]
    differences = [each.difference for each in report.trials if each.difference is not None]
    return 0 if shown is None else sum(100 * difference < shown[0] for difference in differences)


def _plans_table(report: JobReport) -> Table:
    chosen = tuple(row for row, plan in enumerate(report.plans) if report.is_answer(plan))
    return replace(Table.of(f"Verified plans ({len(report.plans)})", report.plans, PLAN_COLUMNS), chosen=chosen)


def _trials_table(tried: Sequence[TrialSummary]) -> Table:
    """Return the plans tried, the best of them first: within the limits, then by predicted speed-up."""
    ordered = sorted(tried, key=lambda each: (not each.within, not each.complete, -(each.predicted_speedup or 0.0)))
    shown = f"the first {TRIALS_SHOWN} of {len(tried):,}" if len(tried) > TRIALS_SHOWN else f"{len(tried)}"
    return Table.of(f"Plans tried ({shown})", ordered[:TRIALS_SHOWN], TRIAL_COLUMNS)


def strips(report: JobReport) -> Section:
    """Show every published plan as a strip, and the tried plans at the edge of the search."""
    published = tuple(
        StripRow(
            f"plan {plan.id}" + (", the answer" if report.is_answer(plan) else ""),
            plan.plan,
            f"{plan.speedup:.2f}x, {_worth(plan)}{formatting.compensated(plan)}",
        )
        for plan in report.plans
    )
    best = sorted((each for each in report.trials if each.within), key=_predicted_time)
    searched = tuple(
        StripRow(
            f"try {each.order}",
            each.plan,
            of_drafter(each, lambda own: f"{own.time:.2f} of plain decoding's time a token, predicted")
            or known(each.predicted_speedup, "{:.2f}x predicted, ".format) + known(each.difference, formatting.points),
        )
        for each in best[:STRIPS_SHOWN]
    )
    groups = []
    if published:
        groups.append(Strips("Verified, the fastest first", published))
    if searched:
        groups.append(Strips(f"Tried and within the limits, the {len(searched)} predicted fastest", searched))
    waiting = _awaited(report)
    seen = set("".join(row.plan for group in groups for row in group.rows))
    return Section(
        "plans",
        "Plans",
        "The plans, layer by layer",
        paragraphs=() if groups else (f"No plan has been {'published' if waiting else 'scored'} yet{waiting}.",),
        legend=tuple((action.letter, action.label, action.row.summary) for action in Action if action.letter in seen),
        strips=tuple(groups),
    )


def _worth(plan: Plan) -> str:
    """Return what a plan costs in accuracy, or how much of its drafts is accepted."""
    return drafted(plan, lambda own: f"{own['acceptance']:.3f} accepted") or (
        f"{formatting.points(plan.difference)}{formatting.on_task(plan)}"
    )


def _predicted_time(trial: TrialSummary) -> float:
    """Return what trials are ordered by, the fastest first."""
    return -(trial.predicted_speedup or 0.0) if trial.drafter is None else trial.drafter.time


def redundancy(report: JobReport) -> Section:
    """Show the heat map of the calibration statistics."""
    section = Section("redundancy", "Redundancy", "What looked redundant")
    chart = figures.redundancy(report.redundancy)
    if chart is None:
        return replace(section, paragraphs=(f"Redundancy: {formatting.NOT_MEASURED}.",))
    text = (
        "Statistics of every layer on the calibration split, vision and text tokens apart. Rows have different "
        "units, so each is coloured from its own lowest to its own highest value: compare within a row."
    )
    table = Table.of(f"Measurements ({len(report.redundancy)})", report.redundancy, MEASUREMENT_COLUMNS)
    return replace(section, paragraphs=(text,), charts=(chart,), tables=(table,))


def theory(check: TheoryCheck | None) -> Section:
    """Compare predicted risk with measured harm."""
    section = Section("theory", "Theory", "Did the criterion foresee the harm?")
    before = "" if check is None or check.evidence is None else check.evidence.verdict
    if check is None or not (check.plans.pairs or check.layers or before):
        return replace(section, paragraphs=(f"Predicted risk against harm: {formatting.NOT_MEASURED}.",))
    paragraphs = []
    charts = []
    if check.plans.pairs:
        paragraphs += [
            f"Each dot is a plan scored on the whole search split: what criterion {check.criterion} predicted (the sum "
            "of its layers' risks) against the accuracy that the plan lost.",
            f"{_correlation(check.plans.agreement)} The plans share layers and were chosen by the search, so the true "
            "uncertainty is larger; `skipplan validate-theory` tests the criterion on held-out data, against chance.",
        ]
        charts.append(figures.theory(check))
    if before:
        paragraphs.append(f"When the search began: {before} (95 % interval).")
    if check.layers:
        found = [f"{Action.of(letter).label}: {_correlation(each.agreement)}" for letter, each in check.layers.items()]
        paragraphs.append(f"Layer by layer, against the divergence that an action alone causes. {' '.join(found)}")
        charts.append(figures.theory_layers(check))
    return replace(section, paragraphs=tuple(paragraphs), charts=tuple(charts))


def _correlation(agreement: Agreement) -> str:
    if agreement.rho is None or agreement.low is None or agreement.high is None:
        return "Ranks cannot be compared: there are too few pairs, or all came out the same."
    return (
        f"Spearman's rank correlation is {agreement.rho:.2f}, 95 % interval [{agreement.low:.2f}, "
        f"{agreement.high:.2f}], over {agreement.pairs} pairs."
    )


def progress(report: JobReport, curves: Sequence[tuple[str, Sequence[Step]]]) -> Section:
    """Show hypervolume over budget, of this job and of other strategies on the same model and task."""
    section = Section("progress", "Search", "How the search went")
    chart = figures.progress(curves, report)
    if chart is None:
        return replace(section, paragraphs=(f"Progress of the search: {formatting.NOT_MEASURED}{_awaited(report)}.",))
    limit = formatting.limit(reference(report)[1])
    others = len(curves) - 1
    paragraphs = [
        f"The share of the region between no time and the dense model's time, and between no loss and {limit} "
        "of loss, that the plans found so far cover (their hypervolume, on the search split with predicted latency).",
    ]
    if others:
        paragraphs.append(
            "Other jobs of this database on the same model and task are drawn beside it, scored with this job's "
            "latency profile and limits."
        )
    rows = [(name, step) for name, found in curves for step in found]
    table = Table.of(f"Plans that widened the front ({len(rows)})", rows, STEP_COLUMNS)
    return replace(section, paragraphs=tuple(paragraphs), charts=(chart,), tables=(table,))


def breakdown(report: JobReport) -> Section:
    """Show where the time of a request goes."""
    section = Section("latency", "Latency", "Where the time goes")
    chart = latency.breakdown(report)
    served = [(plan, each) for plan in report.plans for each in plan.engine_latencies]
    in_engines = (Table.of(f"Latency in engines ({len(served)})", served, ENGINE_COLUMNS),) if served else ()
    if chart is None or report.profile is None:
        return replace(section, paragraphs=(f"Latency profile: {formatting.NOT_MEASURED}.",), tables=in_engines)
    profile = report.profile
    text = (
        f"{profile.device}; {profile.workload}; prompts of {profile.prompt_tokens} tokens; a dense request takes "
        f"{formatting.milliseconds(profile.dense_latency_seconds)}. Bars are what the profile of single layers adds "
        f"up to (median error {formatting.percent(profile.relative_error)} on random plans), diamonds what was "
        "measured of the whole request, in alternating pairs with dense; the machine may have run faster or slower "
        "by then."
    )
    columns = [Column[int]("layer", str, number=True)] + [
        Column(f"{Action.of(letter).label}, ms", partial(_layer_milliseconds, seconds), number=True)
        for letter, seconds in profile.layer_seconds.items()
    ]
    layers = range(len(profile.layer_seconds[Action.RUN.letter]))
    table = Table.of("Milliseconds of every layer", layers, columns)
    charts = (chart, latency.layers(profile))
    return replace(section, paragraphs=(text,), charts=charts, tables=(*in_engines, table))


def _layer_milliseconds(seconds: Sequence[float], layer: int) -> str:
    return f"{1000 * seconds[layer]:.3f}"
