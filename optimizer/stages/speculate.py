"""In lossless jobs: time finalists as drafters beside dense, and check that their answers are dense's, token by token.

Timed pairs take an undisturbed worker; a further check of held-out answers is shared by all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

from optimizer.search.space import Candidate
from optimizer.stages import dense_answers
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.verify import Finalist
from workers.messages import (
    AnswerDense,
    CheckSpeculation,
    CompareSpeculation,
    DenseAnswers,
    Exactness,
    Failure,
    SpeculationComparison,
)
from workers.runtime import Action, SkipPlan

CHECKED = 200
"""Held-out samples whose answers are compared beside those of the timed pairs."""
TRIED = 8
"""Held-out samples of which the first that dense answers is drafted before anything else is computed."""


def require_drafting(context: JobContext) -> None:
    """Let a plan of one skipped layer draft an answer, before anything else is computed.

    Raises JobFailed where the runtime cannot speculate with the model.
    """
    if context.spec.is_lossless:
        context.load_or_compute("can draft", bool, lambda: _drafts(context))


def _drafts(context: JobContext) -> bool:
    skipped = context.space.free_layers[0]
    plan = SkipPlan.dense(context.worker.num_layers).with_action(skipped, Action.SKIP)
    count = min(TRIED, len(context.task.held_out))
    ((_, dense),) = context.ask([AnswerDense("held_out", 0, count)])
    assert isinstance(dense, DenseAnswers)
    first = next((number for number, answer in enumerate(dense.tokens) if answer is not None), None)
    if first is None:
        failed = dense.evaluation.failed_samples
        context.failed_samples.add("held_out", failed)
        raise JobFailed(f"the dense model answered none of the first {count} held-out samples: {min(failed.values())}")
    request = CheckSpeculation(plan.text, first, first + 1, dense.tokens[first : first + 1])
    ((_, found),) = context.run([request])
    if isinstance(found, Failure):
        raise JobFailed(f"mode: lossless cannot be had of this model: {found.reason}")
    return True


def run(context: JobContext, finalists: tuple[Finalist, ...]) -> dict[Candidate, SpeculationComparison]:
    """Measure each finalist, or read it back; one that cannot be measured, or is not exact, is left out with a note.

    Raises JobFailed where an answer was not dense's under each finalist.
    """
    context.progress.begin("measure speculation", len(finalists))
    measured: dict[Candidate, SpeculationComparison] = {}
    wrong = []
    comparisons = context.turns.together(*(partial(_measure, context, finalist) for finalist in finalists))
    for finalist, found in zip(finalists, comparisons, strict=True):
        if found is None:
            continue
        if reason := inexact(found.exactness):
            wrong.append(f"plan {finalist.candidate} is not published: {reason}")
            context.progress.note(wrong[-1])
        else:
            measured[finalist.candidate] = found
    if wrong and not measured:
        raise JobFailed(wrong[0])
    return measured


def _measure(context: JobContext, finalist: Finalist) -> SpeculationComparison | None:
    name, compare = str(finalist.candidate), partial(_compare, context, finalist)
    found: SpeculationComparison | None = context.load_or_compute(
        f"speculate {name}", SpeculationComparison | None, compare
    )
    if found is not None:
        context.progress.advance(news=f"{name} {found.latency.speedup:.2f}x")
    return found


def inexact(found: Exactness) -> str:
    """Say that answers were not the dense model's; empty where all were, near ties left aside."""
    if not found.different:
        return ""
    return (
        f"{len(found.different)} of {len(found.prompts)} answers were not the dense model's, the first to "
        f"{found.different[0]}"
    )


def comparison_of(context: JobContext, finalist: Finalist) -> CompareSpeculation:
    """Return the request that times a finalist on the job's own held-out prompts."""
    return CompareSpeculation(
        finalist.candidate.plan.text,
        workload=context.workload,
        precision=context.spec.latency.precision,
        confidence=context.spec.constraint.confidence,
        max_seconds=context.spec.latency.max_seconds,
        seed=context.spec.search.seed,
        compensation=finalist.candidate.compensation,
        artifact=finalist.artifact,
    )


def _compare(context: JobContext, finalist: Finalist) -> SpeculationComparison | None:
    found = context.ask_one(comparison_of(context, finalist), f"speculation with plan {finalist.candidate}")
    if found is None:
        return None
    assert isinstance(found, SpeculationComparison)
    context.failed_samples.add("held_out", found.latency.failed_samples)
    exact = found.exactness
    for _, part in context.ask(_checks(context, finalist)):
        assert isinstance(part, Exactness)
        exact = exact.joined(part)
    return replace(found, exactness=exact)


def _checks(context: JobContext, finalist: Finalist) -> list[CheckSpeculation]:
    """Share the first held-out samples among the workers."""
    targets = dense_answers.run(context, "held_out").tokens[:CHECKED]
    parts = max(1, min(context.pool.size, len(targets) // 8))
    cuts = [len(targets) * number // parts for number in range(parts + 1)]
    candidate = finalist.candidate
    return [
        CheckSpeculation(
            candidate.plan.text, start, stop, targets[start:stop], candidate.compensation, finalist.artifact
        )
        for start, stop in pairwise(cuts)
    ]
