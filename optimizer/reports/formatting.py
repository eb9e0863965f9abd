"""Format the figures of a report as people read them: sentences, points, milliseconds, shares in per cent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimizer.job.result import Loss, drafting_of, judging, losses, worst_task
from optimizer.search.goals import Goal
from optimizer.search.trial import GoalFigures
from storage.records.engine_latencies import EngineLatency
from storage.records.plans import LOSSLESS, Plan
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import Action, SkipPlan

if TYPE_CHECKING:
    from optimizer.reports.data import JobReport, TrialSummary

NOT_MEASURED = "not measured"
SIGNED = "+z.2f"
"""Format of signed points; what rounds to nothing has no minus."""


@dataclass(frozen=True)
class Summary:
    """The report's first screen: one sentence that answers, and the sentences that qualify it."""

    headline: str
    sentences: tuple[str, ...]
    tone: str
    """``"good"`` where a plan is the answer, ``"none"`` where dense is, ``"open"`` while in doubt."""


def summary(report: JobReport) -> Summary:
    """Say the result, its cost and how sure that is; every number is the database's, rounded."""
    warning = (f"Warning: {report.result.warning}.",) if report.result.warning else ()
    if report.best is not None:
        how = "with the dense model's own answers, drafted with " if report.best.mode == LOSSLESS else "with "
        answer = f"{report.model_name} on {report.task_name} runs {times_as_fast(report.best)} as the dense model {how}"
        answer += f"{layers(report.best.plan)}."
        return Summary(answer, (*warning, *_qualifications(report, report.best)), "open" if warning else "good")
    if report.job.state == "infeasible":
        return Summary(
            f"No plan met the constraint: the dense model is the answer for {report.model_name} on {report.task_name}.",
            (*warning, f"{_sentence(report.job.error or 'No reason was recorded')}", *_effort(report)),
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


def _qualifications(report: JobReport, best: Plan) -> tuple[str, ...]:
    level = best.secondary.get("difference_confidence", best.confidence)
    pairs = best.secondary.get("latency_pairs")
    images = best.secondary.get("images")
    lost = max(0.0, -best.difference_low)
    served = judging(best)
    return (
        *(() if served is None else (f"Judged in the engine: {engine_speedup(served)}.",)),
        f"Speed{' of generate' if served else ''}: "
        f"{milliseconds(best.dense_latency_seconds)} become {milliseconds(best.latency_seconds)} a request "
        f"({best.workload}) on {best.device}; the speed-up lies between {best.speedup_low:.2f} and "
        f"{best.speedup_high:.2f} ({percent(best.confidence)} confidence"
        + (f", {pairs} alternating pairs with dense)." if pairs else ").")
        + f" The KV cache takes {kv_cache(best)} of the dense one's room.",
        _lossless_cost(best, found)
        if (found := drafting_of(best)) is not None
        else _several_costs(found_losses)
        if (found_losses := losses(best))
        else f"Cost: on {count(best.n_samples)} held-out samples"
        + (f" of {count(images)} images" if images else "")
        + f" it scores {best.accuracy:.3f}, the dense model {best.dense_accuracy:.3f}: a difference of "
        f"{points(best.difference)}. The loss is at most {100 * lost:.2f} points "
        f"(upper end of the interval at {percent(level)} confidence); {_limit(report)}.",
        *((_compensation(best),) if best.compensation != NO_COMPENSATION else ()),
        *_effort(report),
    )


def _several_costs(found: Sequence[Loss]) -> str:
    """Say what a plan loses on everything that it was judged by."""
    return f"Cost, held-out: {'; '.join(map(loss, found))}."


def loss(each: Loss) -> str:
    """Write a held-out loss with its interval and its limit: ``"scenes -0.4 points [-1.1, +0.2], limit 1 point"``."""
    if each.is_text:
        allowed = "no limit" if each.max_loss is None else f"limit {each.max_loss:g}"
        divergence = span(each.loss, each.loss_low, each.loss_high, ".3f")
        return f"{each.name} {divergence} nats a token on {count(each.n_samples)} passages, {allowed}"
    allowed = "no limit" if each.max_loss is None else f"limit {limit(each.max_loss)}"
    if each.min_accuracy is not None:
        allowed += f", accuracy at least {each.min_accuracy:g}"
    ends = interval(-100 * each.loss_high, -100 * each.loss_low, SIGNED)
    return (
        f"{each.name} {points(-each.loss)} {ends} ({each.accuracy:.3f}, dense {each.dense_accuracy:.3f}, n = "
        f"{count(each.n_samples)}), {allowed}"
    )


def _lossless_cost(best: Plan, found: dict[str, Any]) -> str:
    return (
        f"Lossless: the dense model verifies every token, and the answers to {count(found['answers_compared'])} "
        f"prompts were its own token for token; {count(found['near_ties'])} of them part at a near tie, behind which "
        f"nothing is compared. Of the positions of its answers on "
        f"{count(found['n_samples'])} held-out samples {acceptance(found)} are drafted right; decoding behind the "
        f"first token is {decoding(found)} as fast. Beside the dense model it takes "
        f"{(best.extra_bytes or 0) / 1e6:.1f} MB."
    )


def _compensation(plan: Plan) -> str:
    """Say how a plan's maps were fitted, and on what mixture."""
    fitted = plan.secondary.get("compensation", {})
    if not fitted.get("text_tokens"):
        return f"Compensation: {plan.compensation}."
    tokens, text = count(fitted["tokens"]), count(fitted["text_tokens"])
    whose = "of the file compensation.text" if "text_id=" in plan.compensation else "sampled from the dense model"
    return f"Compensation: {plan.compensation}; fitted on {tokens} tokens, of them {text} of general text {whose}."


def _effort(report: JobReport) -> tuple[str, ...]:
    if not report.trials and not report.failed:
        return ()
    text = f"Search: {_plural(len(report.trials) + len(report.failed), 'plan')} tried, {count(report.num_complete)} of "
    text += f"them on the whole search split of {count(report.search_samples or 0)} samples"
    text += f"; {count(len(report.failed))} could not be scored" if report.failed else ""
    stopped = report.result.search["stopped_because"]
    text += f". It ended because {stopped}." if stopped else "."
    if report.plans:
        text += f" {_plural(len(report.plans), 'plan')} verified on held-out samples, "
        text += f"{count(report.num_meeting)} of them within the limits."
    return (text,)


def _limit(report: JobReport) -> str:
    allowed = report.spec.allowed_loss
    return "the job set no limit to it" if allowed is None else f"the job allows {limit(allowed)}"


def layers(plan: str) -> str:
    """Return the layers that do other than run, counted and listed: ``"3 of 12 layers skipped (2, 5-6)"``."""
    taken = {action: SkipPlan.parse(plan).layers(action) for action in Action if action is not Action.RUN}
    named = {action: layers for action, layers in taken.items() if layers}
    if not named:
        return "no layer touched"
    parts = [f"{action.row.past} ({ranges(which)})" for action, which in named.items()]
    counts = [str(len(which)) for which in named.values()]
    first = f"{counts[0]} of {len(plan)} layers {parts[0]}"
    return " and ".join([first, *(f"{number} {part}" for number, part in zip(counts[1:], parts[1:], strict=True))])


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs joined: ``[2, 5, 6, 7]`` is ``"2, 5-7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def constraint(report: JobReport) -> list[str]:
    """Return the job's limits, one a line."""
    limits = dict(report.spec.limits)
    several: list[str] = []
    if report.spec.goals is not None:  # whose limits are written out, those of the constraint included
        several = [sentence for goal in report.spec.goals.each for sentence in _limits_of(goal)]
        limits = {name: value for name, value in limits.items() if name not in ("max_accuracy_drop", "min_accuracy")}
    sentences: dict[str, Callable[[float], str]] = {
        "max_accuracy_drop": lambda value: f"loss of accuracy at most {limit(value)}",
        "min_accuracy": lambda value: f"accuracy at least {value:g}",
        "min_speedup": lambda value: f"speed-up at least {value:g}",
        "max_latency_ms": lambda value: f"a request in at most {value:g} ms",
        "max_kv_cache_bytes": lambda value: f"KV cache of at most {count(value)} bytes",
        "max_layers_touched": lambda value: f"at most {value:g} layers touched",
    }
    return several + [say(limits[name]) for name, say in sentences.items() if name in limits] or ["none"]


def _limits_of(goal: Goal) -> list[str]:
    """Return the limits on one of several losses."""
    if goal.is_text:
        return [] if goal.max_loss is None else [f"divergence on {goal.name} at most {goal.max_loss:g} nats a token"]
    found = [] if goal.max_loss is None else [f"loss of accuracy on {goal.name} at most {limit(goal.max_loss)}"]
    return found + ([] if goal.min_accuracy is None else [f"accuracy on {goal.name} at least {goal.min_accuracy:g}"])


def trial_line(each: TrialSummary) -> str:
    """One line about a plan as the search saw it."""
    if each.goals:
        speed = "" if each.predicted_speedup is None else f", predicted {each.predicted_speedup:.2f}x"
        return f"{'; '.join(map(searched_loss, each.goals))} on {each.n_samples} search samples{speed}"
    difference = "dense was not scored" if each.difference is None else f"{points(each.difference)} to dense"
    speed = "" if each.predicted_speedup is None else f", predicted {each.predicted_speedup:.2f}x"
    return f"{difference} on {each.n_samples} search samples{speed}"


def searched_loss(each: GoalFigures) -> str:
    """Write a loss as the search saw it: ``"scenes -0.40 points"``, ``"text 0.210 nats"``."""
    return f"{each.name} {each.loss:.3f} nats" if each.is_text else f"{each.name} {points(-each.loss)}"


def points(value: float) -> str:
    """Return a share as signed points: 0.004 is ``"+0.40 points"``."""
    return f"{signed(value)} points"


def signed(value: float) -> str:
    """Return a share in signed points, without the word; what rounds to nothing has no minus: ``"+0.00"``."""
    return f"{100 * value:{SIGNED}}"


def interval(low: float, high: float, form: str = ".2f") -> str:
    """Return the ends of an interval, each in a format of Python's: ``"[1.48, 1.56]"``."""
    return f"[{low:{form}}, {high:{form}}]"


def span(value: float, low: float, high: float, form: str = ".2f", unit: str = "") -> str:
    """Return a figure with its interval: ``"1.52x [1.48, 1.56]"``."""
    return f"{value:{form}}{unit} {interval(low, high, form)}"


def accuracy(plan: Plan) -> str:
    """Return a plan's accuracy as a share, with its interval; of several tasks that of the one that is named."""
    return span(plan.accuracy, plan.accuracy_low, plan.accuracy_high, ".3f") + on_task(plan)


def difference(plan: Plan) -> str:
    """Return a plan's difference to dense in points, with its interval; the answers of a lossless plan are dense's."""
    if plan.mode == LOSSLESS:
        return "none, lossless"
    return f"{signed(plan.difference)} {difference_interval(plan)}{on_task(plan)}"


def on_task(plan: Plan) -> str:
    """Return which of several tasks a plan's own figures are of, as an addition: ``" on scenes"``."""
    worst = worst_task(plan)
    return f" on {worst}" if worst else ""


def drafting(plan: Plan) -> str:
    """Return what a lossless plan's drafts are worth: ``"0.949 [0.93, 0.96] accepted, 2.4 tokens a round ..."``."""
    found = drafting_of(plan)
    if found is None:
        return ""
    extra = "" if plan.extra_bytes is None else f", {plan.extra_bytes / 1e6:.1f} MB more memory"
    return f"{acceptance(found)} accepted, {found['tokens_per_round']:.1f} tokens a round expected{extra}"


def acceptance(found: dict[str, Any]) -> str:
    """Return a drafter's acceptance as a share, with its interval."""
    return span(found["acceptance"], found["acceptance_low"], found["acceptance_high"], ".3f")


def decoding(found: dict[str, Any]) -> str:
    """Return the speed-up of a drafter's decoding, with its interval."""
    return span(
        found["decoding_speedup"], found["decoding_speedup_low"], found["decoding_speedup_high"], ".2f", unit="x"
    )


def difference_interval(plan: Plan) -> str:
    """Return the interval of a plan's difference to dense, in signed points."""
    return interval(100 * plan.difference_low, 100 * plan.difference_high, SIGNED)


def speedup(plan: Plan, unit: str = "") -> str:
    """Return a plan's measured speed-up, with its interval."""
    return span(plan.speedup, plan.speedup_low, plan.speedup_high, unit=unit)


def engine_speedup(latency: EngineLatency) -> str:
    """Return a plan's speed-up in an engine: ``"vllm 0.32.0, 16 at once: 1.52 [1.48, 1.56]"``."""
    speedup = span(latency.speedup, latency.speedup_low, latency.speedup_high)
    return f"{latency.engine} {latency.version}, {latency.concurrency} at once: {speedup}"


def times_as_fast(plan: Plan) -> str:
    """Return how fast a plan is by what judged it: ``"1.52 times as fast"``, with the engine where one did."""
    served = judging(plan)
    if served is None:
        return f"{plan.speedup:.2f} times as fast"
    return f"{served.speedup:.2f} times as fast in {served.engine} {served.version} ({served.concurrency} at once)"


def request(plan: Plan) -> str:
    """Return the milliseconds of a request with a plan, and with the dense model."""
    return f"{milliseconds(plan.latency_seconds)} (dense {milliseconds(plan.dense_latency_seconds)})"


def kv_cache(plan: Plan) -> str:
    """Return the share of the dense KV cache that a plan leaves."""
    return share(plan.kv_cache_bytes, plan.dense_kv_cache_bytes)


def compensated(plan: Plan | TrialSummary) -> str:
    """Return the compensation of a plan as an addition to a line; empty for plain skips."""
    return "" if plan.compensation == NO_COMPENSATION else f"; {plan.compensation}"


def limit(share: float) -> str:
    """Return a share in points as a person would say it: ``"1 point"``, ``"2.5 points"``."""
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with a decimal."""
    return f"{1000 * seconds:.1f} ms"


def percent(value: float) -> str:
    """Return a share as per cent, without decimals that say nothing."""
    return f"{100 * value:.4g} %"


def share(part: float, whole: float) -> str:
    """Part of a whole in per cent."""
    return f"{part / whole:.0%}".replace("%", " %") if whole else NOT_MEASURED


def count(number: float) -> str:
    """Return a number with thousands separated."""
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Return a span of time in its two largest units."""
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


def short_answer(report: JobReport) -> str:
    """Return a job's answer in a few words."""
    if report.best is not None:
        doubt = ", but see its warning" if report.result.warning else ""
        cost = (
            "lossless" if report.best.mode == LOSSLESS else f"at {points(report.best.difference)}{on_task(report.best)}"
        )
        return f"{times_as_fast(report.best)} {cost}{doubt}"
    return "dense is the answer" if report.job.state == "infeasible" else report.job.state


def sent(share: Mapping[str, Any]) -> str:
    """Return the share of prompts that a guard sends to the dense model, with its interval."""
    if not share["prompts"]:
        return NOT_MEASURED
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['sent']:.1f} % [{low:.1f}, {high:.1f}] of {count(share['prompts'])}"


def net_speedup(guard: Mapping[str, Any]) -> str:
    """Return the expected speed-up of a plan with its guard, which is known of single prompts alone."""
    return f"{guard['net_speedup']:.2f}" if "net_speedup" in guard else NOT_MEASURED


def sent_elsewhere(guard: Mapping[str, Any]) -> str:
    """Return the shares of other tasks' prompts and of text that a guard sends to the dense model."""
    beside = guard["tasks"] | ({"text": guard["text"]} if "text" in guard else {})
    return "; ".join(f"{name} {sent(share)}" for name, share in beside.items()) or NOT_MEASURED
