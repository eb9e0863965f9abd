"""The report's figures in words, and in the units that people read: points, milliseconds, shares in per cent."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.report.data import JobReport, Tried, meets_constraint
from optimizer.results import layers_by_action
from storage.plans import Plan

NOT_MEASURED = "not measured"

ACTIONS = {
    "R": ("run", "nothing is skipped"),
    "F": ("freeze", "vision tokens keep their state"),
    "B": ("bypass", "vision tokens pass by, text does not see them"),
    "S": ("skip", "the whole layer is left out"),
}


@dataclass(frozen=True)
class Summary:
    """The report's first screen: one sentence that answers, and the sentences that qualify it."""

    headline: str
    sentences: tuple[str, ...]
    tone: str
    """``"good"`` where a plan is the answer, ``"none"`` where dense is, ``"open"`` while the job has not ended."""


def summary(report: JobReport) -> Summary:
    """What was found, what it costs and how sure that is; every number is the database's, rounded."""
    if report.best is not None:
        return Summary(_answer(report, report.best), _qualifications(report, report.best), "good")
    if report.job.state == "infeasible":
        return Summary(
            f"No plan met the constraint: the dense model is the answer for {report.model_name} on {report.task_name}.",
            (f"{_sentence(report.job.error or 'No reason was recorded')}", *_effort(report)),
            "none",
        )
    states = {
        "queued": "is waiting in the queue",
        "running": "is running",
        "failed": "failed",
        "cancelled": "was cancelled",
        "succeeded": "succeeded",
    }
    reason = (_sentence(report.job.error),) if report.job.error else ()
    return Summary(
        f"Job {report.job.id} ({report.model_name} on {report.task_name}) {states[report.job.state]}; "
        "this report shows what is stored so far.",
        (*reason, *_effort(report)),
        "open",
    )


def _answer(report: JobReport, best: Plan) -> str:
    return (
        f"{report.model_name} on {report.task_name} runs {times(best.speedup)} as fast as the dense model "
        f"when it does {layers(best.plan)}."
    )


def _qualifications(report: JobReport, best: Plan) -> tuple[str, ...]:
    level = best.secondary.get("difference_confidence", best.confidence)
    pairs = best.secondary.get("latency_pairs")
    images = best.secondary.get("images")
    lost = max(0.0, -best.difference_low)
    return (
        f"Speed: {milliseconds(best.dense_seconds)} become {milliseconds(best.seconds)} a request "
        f"({best.workload}) on {best.device}; the speed-up lies between {best.speedup_low:.2f} and "
        f"{best.speedup_high:.2f} ({percent(best.confidence)} confidence"
        + (f", {pairs} alternating pairs with dense)." if pairs else ").")
        + f" The KV cache shrinks to {share(best.kv_cache_bytes, best.dense_kv_cache_bytes)} of the dense one's.",
        f"Cost: on {count(best.n)} held-out samples"
        + (f" of {count(images)} images" if images else "")
        + f" it scores {best.accuracy:.3f}, the dense model {best.dense_accuracy:.3f}: a difference of "
        f"{points(best.difference)}. The loss is at most {100 * lost:.2f} points "
        f"(upper end of the interval at {percent(level)} confidence); {_limit(report)}.",
        *((f"Compensation: {best.compensation}.",) if best.compensation != "none" else ()),
        *_effort(report),
    )


def _effort(report: JobReport) -> tuple[str, ...]:
    if not report.tried and not report.failed:
        return ()
    complete = sum(each.complete for each in report.tried)
    text = f"Search: {_plural(len(report.tried) + len(report.failed), 'plan')} tried, {count(complete)} of them on "
    text += f"the whole search split of {count(report.search_samples or 0)} samples"
    text += f"; {count(len(report.failed))} could not be scored" if report.failed else ""
    stopped = report.result.search["stopped_because"]
    text += f". It ended because {stopped}." if stopped else "."
    verified = len(report.plans)
    kept = sum(meets_constraint(plan) is True for plan in report.plans)
    if verified:
        text += f" {_plural(verified, 'plan')} verified on held-out samples, {count(kept)} of them within the limits."
    return (text,)


def _limit(report: JobReport) -> str:
    limit = report.spec.constraint.max_accuracy_drop
    return "the job set no limit to it" if limit is None else f"the job allows {100 * limit:g}"


def layers(plan: str) -> str:
    """The layers that do other than run, counted and listed: ``"skip 3 of 12 layers (2, 5-6)"``."""
    named = layers_by_action(plan)
    if not named:
        return "everything (no layer touched)"
    parts = [f"{name} {len(which)} of {len(plan)} layers ({ranges(which)})" for name, which in named.items()]
    return " and ".join(parts)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs joined: ``[2, 5, 6, 7]`` is ``"2, 5-7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def constraint(report: JobReport) -> list[str]:
    """The job's limits, one a line."""
    limits = report.spec.constraint
    lines = []
    if limits.max_accuracy_drop is not None:
        lines.append(f"loss of accuracy at most {100 * limits.max_accuracy_drop:g} points")
    if limits.min_accuracy is not None:
        lines.append(f"accuracy at least {limits.min_accuracy:g}")
    if limits.min_speedup is not None:
        lines.append(f"speed-up at least {limits.min_speedup:g}")
    if limits.max_layers_touched is not None:
        lines.append(f"at most {limits.max_layers_touched} layers touched")
    return lines or ["none"]


def tried_line(each: Tried) -> str:
    """One line about a plan as the search saw it."""
    drop = "dense was not scored" if each.drop is None else f"{points(-each.drop)} to dense"
    speed = "" if each.predicted_speedup is None else f", predicted {each.predicted_speedup:.2f}x"
    return f"{drop} on {each.n} search samples{speed}"


def times(value: float) -> str:
    """A factor: ``"1.83 times"``."""
    return f"{value:.2f} times"


def points(value: float) -> str:
    """A share as signed points: 0.004 is ``"+0.40 points"``."""
    return f"{100 * value:+.2f} points"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with a decimal."""
    return f"{1000 * seconds:.1f} ms"


def percent(value: float) -> str:
    """A share as per cent, without decimals that say nothing."""
    return f"{100 * value:.4g} %"


def share(part: float, whole: float) -> str:
    """Part of a whole in per cent."""
    return f"{part / whole:.0%}".replace("%", " %") if whole else NOT_MEASURED


def count(number: float) -> str:
    """A number with thousands separated."""
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
