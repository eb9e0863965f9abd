"""Show people live progress on standard error, and results on standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from optimizer.job.result import JobResult, judgement, judging, layers_by_action, losses
from optimizer.reports import formatting
from optimizer.stages.progress import Display, StageLines, State
from storage.records.plans import LOSSLESS, Plan
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import Action, SkipPlan

ACTION_STYLES = {
    Action.RUN: "green",
    Action.FREEZE: "cyan",
    Action.BYPASS: "blue",
    Action.SKIP: "red",
    Action.SKIP_ATTENTION: "magenta",
    Action.SKIP_MLP: "yellow",
    Action.FREEZE_ATTENTION: "bright_magenta",
    Action.FREEZE_MLP: "bright_yellow",
}


class Screen:
    """Prints progress to standard error, results to standard output.

    Progress is live on a terminal, elsewhere in lines; beside ``--json`` only in lines.
    """

    def __init__(self, *, quiet: bool, as_json: bool = False) -> None:
        self._errors = Console(stderr=True, highlight=False)
        self._live = self._errors.is_terminal and not quiet and not as_json
        self._lines = not self._errors.is_terminal and not quiet
        self._began = time.monotonic()
        width = None if sys.stdout.isatty() else 160  # a file or pipe has no width to fold at
        self._out = Console(highlight=False, width=width)

    def say(self, text: str) -> None:
        """Print a remark; nothing when quiet."""
        if self._live or self._lines:
            self._errors.print(text, markup=False, soft_wrap=self._lines)

    def warn(self, text: str) -> None:
        """Print a warning to standard error, with or without a terminal."""
        self._errors.print(f"skipplan: {text}", markup=False, soft_wrap=True)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show a spinner, or lines, while something of unknown length happens."""
        if self._live:
            with Status(text, console=self._errors):
                yield
            return
        with self.stages() as display:
            display.update(State(text))
            yield

    @contextmanager
    def stages(self) -> Iterator[Display]:
        """Display a job's stages while they run."""
        if self._lines:
            with StageLines(lambda event, state: self._line(state.text), self._line) as lines:
                yield lines
        else:
            with LiveStages(self._errors, enabled=self._live) as bars:
                yield bars

    def _line(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        self._errors.print(f"[{minutes}:{seconds:02}] {text}", markup=False, soft_wrap=True)

    def result(self, result: JobResult) -> None:
        """Print the table of a finished job's plans, and the best one in a sentence."""
        title = f"Job {result.job.id}: {result.job.state}"
        if result.warning:
            self._out.print(f"Warning: {result.warning}.", markup=False, style="bold red")
        if result.failed_samples:
            self._out.print(
                f"{len(result.failed_samples)} samples failed and were left out (skipplan jobs show {result.job.id}).",
                markup=False,
            )
        if not result.search["stopped_because"]:  # it ended before the search, as when no plan can meet the constraint
            self._out.print(title, markup=False)
            return
        self._out.print(plans_table(result.plans, best=result.best, title=title))
        tried, failed = result.search["plans_tried"], result.search["plans_failed"]
        self._out.print(
            f"{tried} plans tried ({failed} failed); {result.search['stopped_because']}. Accuracy on held-out samples "
            "only; intervals at the job's confidence, the difference's corrected for the number of plans.",
            markup=False,
        )
        if result.best is not None:
            self._out.print(answer(result.best), markup=False, style="bold")

    def plans(self, found: list[Plan], changes: list[tuple[str, ...]]) -> None:
        self._out.print(plans_table(tuple(found), best=None, title=None, changes=changes))

    def table(self, table: Table) -> None:
        self._out.print(table)


class LiveStages:
    """Show one progress bar per stage, the running one with its latest news."""

    def __init__(self, console: Console, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[news]}", markup=False, style="dim"),
            console=console,
            disable=not enabled,
        )

    def __enter__(self) -> LiveStages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, state: State) -> None:
        """Advance the stage's bar; earlier stages stay as finished."""
        if state.stage not in self._bars:
            for bar in self._bars.values():
                done = self._progress.tasks[bar].completed
                if done or not self._progress.tasks[bar].total:  # else it may have begun beside this one
                    self._progress.update(bar, total=done or 1, completed=done or 1)
            self._bars[state.stage] = self._progress.add_task(state.stage, total=state.total, news="")
        self._progress.update(self._bars[state.stage], completed=state.done, total=state.total, news=state.news)

    def note(self, text: str) -> None:
        """Show a line that stays above the bars."""
        if self._enabled:
            self._progress.console.print(text, markup=False)


def plans_table(
    plans: tuple[Plan, ...], *, best: Plan | None, title: str | None, changes: Sequence[tuple[str, ...]] = ()
) -> Table:
    """Lay published plans out as a table, one a row; with what changed since, where anything did."""
    in_engines = any(plan.engine_latencies for plan in plans)
    table = Table(title=title, title_justify="left", header_style="bold")
    for name, justify in (
        ("id", "right"),
        ("plan", "left"),
        ("layers", "left"),
        ("accuracy", "right"),
        ("difference to dense (points)", "right"),
        ("measured speed-up", "right"),
        ("KV cache", "right"),
        ("limits", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name in ("id", "plan"))  # type: ignore[arg-type]
    drafting = any(plan.mode == LOSSLESS for plan in plans)
    if drafting:
        table.add_column("drafting")
    if in_engines:
        table.add_column("speed-up in engines")
    if any(changes):
        table.add_column("changed since")
    for number, plan in enumerate(plans):
        marked = best is not None and plan.id == best.id
        table.add_row(
            f"{'→ ' if marked else ''}{plan.id}",
            coloured(plan.plan),
            describe_layers(plan.plan) + ("" if plan.compensation == NO_COMPENSATION else f" ({plan.compensation})"),
            formatting.accuracy(plan),
            formatting.difference(plan),
            formatting.speedup(plan, "x"),
            f"{plan.kv_cache_bytes / plan.dense_kv_cache_bytes:.0%}" if plan.dense_kv_cache_bytes else "",
            judgement(plan, {True: "met", False: "missed", None: ""}),
            *([formatting.drafting(plan)] if drafting else []),
            *(["\n".join(map(formatting.engine_speedup, plan.engine_latencies))] if in_engines else []),
            *([", ".join(changes[number])] if any(changes) else []),
            style="bold" if marked else None,
        )
    return table


def coloured(plan: str) -> Text:
    """Colour a plan's letters by action."""
    text = Text()
    for action in SkipPlan.parse(plan):
        text.append(action.letter, style=ACTION_STYLES[action])
    return text


def describe_layers(plan: str) -> str:
    """List the layers that do other than run, for example ``"skip 2 3 7"``."""
    return "; ".join(f"{name} {' '.join(map(str, layers))}" for name, layers in layers_by_action(plan).items())


def figures(plan: Plan) -> str:
    """Summarize a plan's accuracy and speed in half a sentence."""
    if plan.mode == LOSSLESS:
        return f"the dense model's answers, {formatting.times_as_fast(plan)}; {formatting.drafting(plan)}"
    if found := losses(plan):
        return f"{'; '.join(map(formatting.loss, found))}; {formatting.times_as_fast(plan)}"
    return (
        f"accuracy {plan.accuracy:.3f}, {formatting.difference(plan)} points to dense, {formatting.times_as_fast(plan)}"
    )


def answer(plan: Plan) -> str:
    """Describe the best plan in a sentence."""
    compensated = "" if plan.compensation == NO_COMPENSATION else ", gaps compensated"
    return (
        f"Best: plan {plan.id}, {describe_layers(plan.plan)}{compensated}: {formatting.times_as_fast(plan)} as dense "
        f"({'under generate ' if judging(plan) else ''}"
        f"{1000 * plan.dense_latency_seconds:.1f} -> {1000 * plan.latency_seconds:.1f} ms a request, "
        f"{plan.workload}), {_cost(plan)}."
        + "".join(f" {formatting.engine_speedup(each)}." for each in plan.engine_latencies)
    )


def _cost(plan: Plan) -> str:
    if plan.mode == LOSSLESS:
        return f"with the dense model's own answers: {formatting.drafting(plan)}"
    if found := losses(plan):
        return f"held-out {'; '.join(map(formatting.loss, found))}"
    return f"accuracy {plan.accuracy:.3f} against {plan.dense_accuracy:.3f} on {plan.n_samples} held-out samples"
