"""The parts of a report's page as plain values: paragraphs, strips, charts and tables, in the order they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from optimizer.reports import figures, formatting, latency
from optimizer.reports.data import JobReport, Tried, meets_constraint
from optimizer.reports.figures import Chart
from optimizer.reports.progress import Step, reference
from optimizer.reports.theory import TheoryCheck
from optimizer.verification.agreement import Agreement
from storage.records.plans import Plan
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import Action

STRIPS_SHOWN = 12


@dataclass(frozen=True)
class StripRow:
    """A plan drawn as one cell a layer."""

    label: str
    plan: str
    text: str

    @property
    def spoken(self) -> str:
        """The plan for a screen reader."""
        return formatting.layers(self.plan)


@dataclass(frozen=True)
class Strips:
    """Plans under each other."""

    title: str
    rows: tuple[StripRow, ...]


@dataclass(frozen=True)
class Table:
    """A table behind a fold; ``numbers`` are the columns aligned to the right, ``chosen`` the rows to stress."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    open: bool = False


@dataclass(frozen=True)
class PlacedChart:
    """A chart with its heading; ``scale`` asks for the colour scale under a heat map."""

    chart: Chart
    title: str = ""
    scale: bool = False

    @property
    def name(self) -> str:
        """The chart's name, unique on the page."""
        return self.chart.name

    @property
    def height(self) -> int:
        """Pixels."""
        return self.chart.height

    @property
    def description(self) -> str:
        """What the chart shows, in a sentence."""
        return self.chart.description


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    name: str
    short: str
    title: str
    paragraphs: tuple[str, ...] = ()
    legend: tuple[tuple[str, str, str], ...] = ()
    strips: tuple[Strips, ...] = ()
    charts: tuple[PlacedChart, ...] = ()
    tables: tuple[Table, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()


def front(report: JobReport) -> Section:
    """The Pareto front."""
    chart = figures.front(report)
    section = Section("front", "Front", "What was tried, and the front")
    if chart is None:
        return replace(section, paragraphs=(f"Front: {formatting.NOT_MEASURED} yet.",))
    paragraphs = [
        "Diamonds are plans verified on held-out samples, with intervals and with speed-ups measured against the dense "
        "model. Dots are plans as the search saw them: accuracy on the search split, speed-up predicted from the "
        "latency profile; they steer the search and are never published. Grey ones break a limit of the job or were "
        "given up early. Point at a plan, or tap it, to see its layers.",
        f"Limits of the job: {'; '.join(formatting.constraint(report))}.",
    ]
    limit = report.spec.max_accuracy_drop
    if limit is not None:
        paragraphs[1] += " The dotted line is the allowed loss; a verified plan's whole interval has to lie above it."
    below = _below(report, chart)
    if below:
        paragraphs.append(
            f"{formatting.count(below)} of the dots lie below the range shown; the table holds the best of them."
        )
    return replace(
        section,
        paragraphs=tuple(paragraphs),
        charts=(PlacedChart(chart),),
        tables=(plans_table(report), tried_table(report.tried)),
    )


def _below(report: JobReport, chart: Chart) -> int:
    shown = chart.layout["yaxis"]["range"]
    return 0 if shown is None else sum(each.drop is not None and -100 * each.drop < shown[0] for each in report.tried)


def plans_table(report: JobReport, *, unfolded: bool = False) -> Table:
    """The published plans with every figure that was verified or measured."""
    rows = tuple(
        (
            str(plan.id),
            formatting.layers(plan.plan),
            f"{plan.accuracy:.3f} [{plan.accuracy_low:.3f}, {plan.accuracy_high:.3f}]",
            f"{formatting.signed(plan.difference)} {formatting.interval(plan.difference_low, plan.difference_high)}",
            f"{plan.speedup:.2f} [{plan.speedup_low:.2f}, {plan.speedup_high:.2f}]",
            formatting.milliseconds(plan.seconds),
            formatting.share(plan.kv_cache_bytes, plan.dense_kv_cache_bytes),
            plan.compensation,
            _judgement(plan),
        )
        for plan in report.plans
    )
    chosen = tuple(
        row for row, plan in enumerate(report.plans) if report.best is not None and plan.id == report.best.id
    )
    return Table(
        f"Verified plans ({len(rows)})",
        (
            "plan",
            "layers",
            "accuracy, held-out",
            "difference, points",
            "speed-up, measured",
            "a request",
            "KV cache",
            "compensation",
            "within the limits",
        ),
        rows,
        numbers=(2, 3, 4, 5, 6),
        chosen=chosen,
        open=unfolded,
    )


def _judgement(plan: Plan) -> str:
    judged = meets_constraint(plan)
    return "not judged" if judged is None else "yes" if judged else "no"


def tried_table(tried: Sequence[Tried], most: int = 100) -> Table:
    """The plans tried, the best of them first: within the limits, then by predicted speed-up."""
    ordered = sorted(tried, key=lambda each: (not each.within, not each.complete, -(each.predicted_speedup or 0.0)))
    rows = tuple(
        (
            each.plan,
            "" if each.drop is None else formatting.signed(-each.drop),
            f"{each.accuracy:.3f}",
            str(each.n),
            "" if each.predicted_speedup is None else f"{each.predicted_speedup:.2f}",
            "yes" if each.within else "no",
            str(each.order),
        )
        for each in ordered[:most]
    )
    shown = f"the first {most} of {len(tried):,}" if len(tried) > most else f"{len(tried)}"
    return Table(
        f"Plans tried ({shown})",
        (
            "plan",
            "difference, points",
            "accuracy, search split",
            "samples",
            "speed-up, predicted",
            "within the limits",
            "tried as number",
        ),
        rows,
        numbers=(1, 2, 3, 4, 6),
    )


def strips(report: JobReport) -> Section:
    """Every published plan as a strip, and the tried plans at the edge of the search."""
    published = tuple(
        StripRow(
            f"plan {plan.id}" + (", the answer" if report.best is not None and plan.id == report.best.id else ""),
            plan.plan,
            f"{plan.speedup:.2f}x, {formatting.points(plan.difference)}"
            + ("" if plan.compensation == NO_COMPENSATION else f"; {plan.compensation}"),
        )
        for plan in report.plans
    )
    best = sorted((each for each in report.tried if each.within), key=lambda each: -(each.predicted_speedup or 0.0))[
        :STRIPS_SHOWN
    ]
    searched = tuple(
        StripRow(
            f"try {each.order}",
            each.plan,
            (f"{each.predicted_speedup:.2f}x predicted, " if each.predicted_speedup else "")
            + ("" if each.drop is None else formatting.points(-each.drop)),
        )
        for each in best
    )
    groups = []
    if published:
        groups.append(Strips("Verified, the fastest first", published))
    if searched:
        groups.append(Strips(f"Tried and within the limits, the {len(searched)} predicted fastest", searched))
    seen = set("".join(row.plan for group in groups for row in group.rows))
    return Section(
        "plans",
        "Plans",
        "The plans, layer by layer",
        paragraphs=() if groups else ("No plan has been scored yet.",),
        legend=tuple((action.letter, action.label, action.row.summary) for action in Action if action.letter in seen),
        strips=tuple(groups),
    )


def redundancy(report: JobReport) -> Section:
    """The heat map of the calibration statistics."""
    section = Section("redundancy", "Redundancy", "What looked redundant")
    chart = figures.redundancy(report.redundancy)
    if chart is None:
        return replace(section, paragraphs=(f"Redundancy: {formatting.NOT_MEASURED}.",))
    rows = tuple(
        (
            figures.row_name(each.name, each.token_group),
            str(each.layer),
            f"{each.value:.6g}",
            "" if each.standard_error is None else f"{each.standard_error:.2g}",
            f"{each.n:,}",
        )
        for each in report.redundancy
    )
    return replace(
        section,
        paragraphs=(
            "Statistics of every layer on the calibration split, vision and text tokens apart. Rows have different "
            "units, so each is coloured from its own lowest to its own highest value: compare within a row.",
        ),
        charts=(PlacedChart(chart, scale=True),),
        tables=(
            Table(
                f"Measurements ({len(rows)})", ("measure", "layer", "value", "standard error", "n"), rows, (1, 2, 3, 4)
            ),
        ),
    )


def theory(check: TheoryCheck | None) -> Section:
    """Predicted risk against measured harm."""
    section = Section("theory", "Theory", "Did the criterion foresee the harm?")
    if check is None or not (check.plans.pairs or check.layers):
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
        charts.append(PlacedChart(figures.theory(check)))
    if check.layers:
        found = [f"{Action.of(letter).label}: {_correlation(each.agreement)}" for letter, each in check.layers.items()]
        paragraphs.append(f"Layer by layer, against the divergence that an action alone causes. {' '.join(found)}")
        charts.append(PlacedChart(figures.theory_layers(check), "Layer by layer"))
    return replace(section, paragraphs=tuple(paragraphs), charts=tuple(charts))


def _correlation(agreement: Agreement) -> str:
    if agreement.rho is None or agreement.low is None or agreement.high is None:
        return "Ranks cannot be compared: there are too few pairs, or all came out the same."
    return (
        f"Spearman's rank correlation is {agreement.rho:.2f}, 95 % interval [{agreement.low:.2f}, "
        f"{agreement.high:.2f}], over {agreement.pairs} pairs."
    )


def progress(report: JobReport, curves: Sequence[tuple[str, Sequence[Step]]]) -> Section:
    """Hypervolume over budget, this job's and other strategies' of the same model and task."""
    section = Section("progress", "Search", "How the search went")
    chart = figures.progress(curves, report)
    if chart is None:
        return replace(section, paragraphs=(f"Progress of the search: {formatting.NOT_MEASURED}.",))
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
    rows = tuple(
        (name, str(step.plans), f"{100 * step.covered:.2f}", step.plan) for name, found in curves for step in found
    )
    return replace(
        section,
        paragraphs=tuple(paragraphs),
        charts=(PlacedChart(chart),),
        tables=(
            Table(
                f"Plans that widened the front ({len(rows)})",
                ("search", "plans tried", "covered, %", "plan"),
                rows,
                (1, 2),
            ),
        ),
    )


def breakdown(report: JobReport) -> Section:
    """Where the time goes."""
    section = Section("latency", "Latency", "Where the time goes")
    chart = latency.breakdown(report)
    if chart is None or report.profile is None:
        return replace(section, paragraphs=(f"Latency profile: {formatting.NOT_MEASURED}.",))
    profile = report.profile
    return replace(
        section,
        paragraphs=(
            f"{profile.device}; {profile.workload}; prompts of {profile.prompt_tokens} tokens; a dense request takes "
            f"{formatting.milliseconds(profile.dense_seconds)}. Bars are what the profile of single layers adds up to "
            f"(median error {formatting.percent(profile.relative_error)} on random plans), diamonds what was "
            "measured of the whole request, in alternating pairs with dense; the machine may have run faster or slower "
            "by then.",
        ),
        charts=(PlacedChart(chart), PlacedChart(latency.layers(profile), "Layer by layer")),
        tables=(_layer_table(report),),
    )


def _layer_table(report: JobReport) -> Table:
    assert report.profile is not None
    seconds = report.profile.layer_seconds
    letters = list(seconds)
    rows = tuple(
        (str(layer), *(f"{1000 * seconds[letter][layer]:.3f}" for letter in letters))
        for layer in range(len(seconds[Action.RUN.letter]))
    )
    names = tuple(f"{Action.of(letter).label}, ms" for letter in letters)
    return Table("Milliseconds of every layer", ("layer", *names), rows, tuple(range(1 + len(letters))))
