"""Name the columns of a report's tables, and write their cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optimizer.job.result import Loss, drafting_of, judgement
from optimizer.reports import figures, formatting
from optimizer.reports.data import TrialSummary
from optimizer.reports.parts import Column
from optimizer.reports.progress import Step
from optimizer.search.trial import DraftValue
from storage.records.engine_latencies import EngineLatency
from storage.records.measurements import Redundancy
from storage.records.plans import Plan


def known(value: float | None, write: Callable[[float], str]) -> str:
    """Return a figure, or nothing where it is not known."""
    return "" if value is None else write(value)


_JUDGEMENTS = {None: "not judged", True: "yes", False: "no"}

PLAN_COLUMNS: tuple[Column[Plan], ...] = (
    Column("plan", lambda plan: str(plan.id)),
    Column("layers", lambda plan: formatting.layers(plan.plan)),
    Column("accuracy, held-out", formatting.accuracy, number=True),
    Column("difference, points", formatting.difference, number=True),
    Column("speed-up, measured", formatting.speedup, number=True),
    Column("a request", lambda plan: formatting.milliseconds(plan.latency_seconds), number=True),
    Column("KV cache", formatting.kv_cache, number=True),
    Column("compensation", lambda plan: plan.compensation),
    Column("within the limits", lambda plan: judgement(plan, _JUDGEMENTS)),
)

Served = tuple[Plan, EngineLatency]


def _beside_dense(name: str, write: Callable[[float], str]) -> Callable[[Served], str]:
    """Return the cell of a figure with dense's behind it."""

    def cell(served: Served) -> str:
        own, dense = getattr(served[1], name), getattr(served[1], f"dense_{name}")
        return known(own, write) + (f" (dense {write(dense)})" if dense is not None else "")

    return cell


ENGINE_COLUMNS: tuple[Column[Served], ...] = (
    Column("plan", lambda each: str(each[0].id)),
    Column("engine", lambda each: f"{each[1].engine} {each[1].version}, {each[1].dtype}"),
    Column("requests at once", lambda each: str(each[1].concurrency), number=True),
    Column(
        "speed-up",
        lambda each: formatting.span(each[1].speedup, each[1].speedup_low, each[1].speedup_high),
        number=True,
    ),
    Column("first token", _beside_dense("first_token_seconds", formatting.milliseconds), number=True),
    Column("each further token", _beside_dense("seconds_per_token", formatting.milliseconds), number=True),
    Column("a request", _beside_dense("latency_seconds", formatting.milliseconds), number=True),
    Column("requests a second", _beside_dense("requests_per_second", "{:.1f}".format), number=True),
    Column("tokens in the KV cache", _beside_dense("kv_cache_tokens", formatting.count), number=True),
)

GUARD_COLUMNS: tuple[Column[Plan], ...] = (
    Column("plan", lambda plan: str(plan.id)),
    Column("reads the input of layer", lambda plan: str(plan.secondary["guard"]["layer"]), number=True),
    Column("false alarms, set", lambda plan: formatting.percent(plan.secondary["guard"]["false_alarms"]), number=True),
    Column(
        "task's own prompts sent to dense",
        lambda plan: formatting.sent(plan.secondary["guard"]["held_out"]),
        number=True,
    ),
    Column("others sent to dense", lambda plan: formatting.sent_elsewhere(plan.secondary["guard"])),
    Column("net speed-up", lambda plan: formatting.net_speedup(plan.secondary["guard"]), number=True),
)

TRIAL_COLUMNS: tuple[Column[TrialSummary], ...] = (
    Column("plan", lambda each: each.plan),
    Column("difference, points", lambda each: known(each.difference, formatting.signed), number=True),
    Column("accuracy, search split", lambda each: f"{each.accuracy:.3f}", number=True),
    Column("samples", lambda each: str(each.n_samples), number=True),
    Column("speed-up, predicted", lambda each: known(each.predicted_speedup, "{:.2f}".format), number=True),
    Column("within the limits", lambda each: "yes" if each.within else "no"),
    Column("tried as number", lambda each: str(each.order), number=True),
)

MEASUREMENT_COLUMNS: tuple[Column[Redundancy], ...] = (
    Column("measure", lambda each: figures.row_name(each.name, each.token_group)),
    Column("layer", lambda each: str(each.layer), number=True),
    Column("value", lambda each: f"{each.value:.6g}", number=True),
    Column("standard error", lambda each: known(each.standard_error, "{:.2g}".format), number=True),
    Column("n", lambda each: f"{each.n:,}", number=True),
)

STEP_COLUMNS: tuple[Column[tuple[str, Step]], ...] = (
    Column("search", lambda row: row[0]),
    Column("plans tried", lambda row: str(row[1].plans), number=True),
    Column("covered, %", lambda row: f"{100 * row[1].covered:.2f}", number=True),
    Column("plan", lambda row: row[1].plan),
)

DRAFTED_COLUMNS: tuple[Column[Plan], ...] = (
    Column("plan", lambda plan: str(plan.id)),
    Column("layers", lambda plan: formatting.layers(plan.plan)),
    Column("acceptance, held-out", lambda plan: drafted(plan, formatting.acceptance), number=True),
    Column(
        "tokens a round, expected",
        lambda plan: drafted(plan, lambda own: f"{own['tokens_per_round']:.2f}"),
        number=True,
    ),
    Column(
        "accepted a round, measured",
        lambda plan: drafted(plan, lambda own: f"{own['accepted_per_round']:.2f}"),
        number=True,
    ),
    Column("speed-up of a request", formatting.speedup, number=True),
    Column("speed-up of decoding", lambda plan: drafted(plan, formatting.decoding), number=True),
    Column("extra memory", lambda plan: known(plan.extra_bytes, lambda own: f"{own / 1e6:.1f} MB"), number=True),
    Column("answers compared", lambda plan: drafted(plan, lambda own: str(own["answers_compared"])), number=True),
    Column("near ties", lambda plan: drafted(plan, lambda own: str(own["near_ties"])), number=True),
    Column("compensation", lambda plan: plan.compensation),
    Column("within the limits", lambda plan: judgement(plan, _JUDGEMENTS)),
)

OffTaskRow = tuple[Plan, str, dict[str, Any]]

OFF_TASK_COLUMNS: tuple[Column[OffTaskRow], ...] = (
    Column("plan", lambda row: str(row[0].id)),
    Column("prompts of", lambda row: row[1]),
    Column("acceptance", lambda row: f"{row[2]['acceptance']:.3f}", number=True),
    Column(
        "speed-up of a request",
        lambda row: formatting.span(row[2]["speedup"], row[2]["speedup_low"], row[2]["speedup_high"]),
        number=True,
    ),
    Column("speed-up of decoding", lambda row: formatting.decoding(row[2]), number=True),
    Column("answers compared", lambda row: str(row[2]["answers_compared"]), number=True),
    Column("near ties", lambda row: str(row[2]["near_ties"]), number=True),
)

DRAFT_TRIAL_COLUMNS: tuple[Column[TrialSummary], ...] = (
    Column("plan", lambda each: each.plan),
    Column("acceptance, search split", lambda each: f"{each.accuracy:.3f}", number=True),
    Column("samples", lambda each: str(each.n_samples), number=True),
    Column("time a token (dense = 1)", lambda each: of_drafter(each, lambda own: f"{own.time:.3f}"), number=True),
    Column("tokens a draft", lambda each: of_drafter(each, lambda own: str(own.draft_length)), number=True),
    Column("extra memory", lambda each: of_drafter(each, lambda own: f"{own.memory:.1%}"), number=True),
    Column("tried as number", lambda each: str(each.order), number=True),
)


def drafted(plan: Plan, write: Callable[[dict[str, Any]], str]) -> str:
    """Return a figure of a verified drafter, or nothing of another plan."""
    found = drafting_of(plan)
    return "" if found is None else write(found)


def of_drafter(trial: TrialSummary, write: Callable[[DraftValue], str]) -> str:
    """Return a figure of a drafter that was tried, or nothing of another plan."""
    return "" if trial.drafter is None else write(trial.drafter)


LOSS_COLUMNS: tuple[Column[tuple[Plan, Loss]], ...] = (
    Column("plan", lambda row: str(row[0].id)),
    Column("judged on", lambda row: row[1].name),
    Column("samples", lambda row: formatting.count(row[1].n_samples), number=True),
    Column("accuracy", lambda row: f"{row[1].accuracy:.3f} (dense {row[1].dense_accuracy:.3f})", number=True),
    Column("loss, its interval and limit", lambda row: formatting.loss(row[1])),
    Column("within", lambda row: _JUDGEMENTS[row[1].within]),
)
