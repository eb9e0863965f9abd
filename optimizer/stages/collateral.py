"""Stage 7: measure what the finalists do to other tasks and to general text, since plans are fitted to one task.

Drafters change no answer there: what is measured is how many of their drafts are right, and the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import partial

from optimizer.search.space import Candidate
from optimizer.search.trial import answered_by_both
from optimizer.stages import speculate
from optimizer.stages.context import JobContext
from optimizer.stages.failed_samples import TooManyFailed
from optimizer.stages.verify import Finalist
from workers.messages import (
    Artifact,
    CompareText,
    EvaluateOtherTask,
    Evaluation,
    Exactness,
    SpeculationComparison,
    TextDivergence,
)
from workers.runtime import SkipPlan
from workers.tasks import Task
from workers.tasks.passages import TextTask


@dataclass(frozen=True)
class OtherTask:
    """Accuracy on held-out samples of a task that the plan was not chosen for, where neither plan nor dense failed."""

    n_samples: int
    accuracy: float
    dense_accuracy: float


@dataclass(frozen=True)
class OffTask:
    """Acceptance and measured speed-ups of a drafter on prompts that it was not chosen for.

    ``speedup`` is of requests, ``decoding_speedup`` of what comes behind their first token.
    """

    pairs: int
    acceptance: float
    speedup: float
    speedup_low: float
    speedup_high: float
    decoding_speedup: float
    decoding_speedup_low: float
    decoding_speedup_high: float
    exactness: Exactness


@dataclass(frozen=True)
class Collateral:
    """A plan's effect beside its task; what could not be measured is left out."""

    tasks: dict[str, OtherTask] = field(default_factory=dict)
    text: TextDivergence | None = None
    off_task: dict[str, OffTask] = field(default_factory=dict)
    """In a lossless job, in the place of the others: by task, and ``TEXT``."""


TEXT = "general text"
"""Name of the text beside those of other tasks."""

Scores = tuple[float | None, ...]
"""Per sample; None where it failed."""


def run(context: JobContext, finalists: tuple[Finalist, ...]) -> dict[Candidate, Collateral]:
    """Measure what the job asks for beside its task, for every verified plan, or read it back."""
    if not context.inputs.other_tasks and context.inputs.other_text is None:
        return {}
    context.progress.begin("collateral", len(finalists))
    found = context.turns.together(*(partial(_load_or_measure, context, finalist) for finalist in finalists))
    return {finalist.candidate: beside for finalist, beside in zip(finalists, found, strict=True)}


def _load_or_measure(context: JobContext, finalist: Finalist) -> Collateral:
    measure = partial(_measure, context, finalist)
    found = context.load_or_compute(f"collateral {finalist.candidate}", Collateral, measure)
    context.progress.advance()
    return found


def _measure(context: JobContext, finalist: Finalist) -> Collateral:
    if context.spec.is_lossless:
        return _speculate(context, finalist)
    candidate, artifact = finalist.candidate, finalist.artifact
    judged = {goal.name: goal for goal in finalist.verdict.goals if not goal.weight}
    tasks = [task for task in context.inputs.other_tasks if task.name not in judged]
    text, *scores = context.turns.together(
        partial(_compare_text, context, candidate, artifact),
        *(partial(_evaluate, context, candidate, artifact, task) for task in tasks),
        *(partial(_dense, context, task) for task in tasks),
    )
    # What the job judges plans by was scored when the plan was verified.
    others = {
        name: OtherTask(own.n_samples, own.accuracy, own.dense_accuracy)
        for name, own in judged.items()
        if not own.is_text
    }
    for task, plan, dense in zip(tasks, scores[: len(tasks)], scores[len(tasks) :], strict=True):
        if plan is not None and dense is not None and (compared := compare(plan, dense)) is not None:
            others[task.name] = compared
    return Collateral(others, text)


def _speculate(context: JobContext, finalist: Finalist) -> Collateral:
    """Time drafting on the prompts of other tasks, and on beginnings of the text's paragraphs."""
    request = speculate.comparison_of(context, finalist)
    requests = {task.name: replace(request, task=task) for task in context.inputs.other_tasks}
    if context.inputs.other_text is not None:
        requests[TEXT] = replace(request, text=context.inputs.other_text)
    found = {}
    for name, each in requests.items():
        reply = context.ask_one(each, f"speculation with {finalist.candidate} on {name}")
        if isinstance(reply, SpeculationComparison):
            shared = {own.name for own in fields(OffTask)}
            figures = {key: value for part in (reply, reply.latency) for key, value in vars(part).items()}
            found[name] = OffTask(**{key: value for key, value in figures.items() if key in shared})
    return Collateral(off_task=found)


def compare(plan: Scores, dense: Scores) -> OtherTask | None:
    """Compare a plan with dense on the samples that neither failed on; None where there are none."""
    as_floats = [[math.nan if score is None else score for score in scores] for scores in (dense, plan)]
    its_dense, own = answered_by_both(*as_floats)
    if not own:
        return None
    return OtherTask(len(own), math.fsum(own) / len(own), math.fsum(its_dense) / len(own))


def _dense(context: JobContext, task: Task) -> Scores | None:
    dense = Candidate(SkipPlan.dense(context.worker.num_layers))
    known: Scores | None = context.load_or_compute(
        f"collateral scores {task.name}", Scores | None, lambda: _evaluate(context, dense, None, task)
    )
    return known


def _evaluate(context: JobContext, candidate: Candidate, artifact: Artifact | None, task: Task) -> Scores | None:
    """Score a plan on another task, marking samples that fail; None where it cannot be done, which is noted."""
    replies = context.turns.together(
        *(
            partial(
                context.ask_one,
                EvaluateOtherTask(candidate.plan.text, task, stop, candidate.compensation, artifact, start),
                f"{candidate} on {task.name}",
            )
            for start, stop in context.slices(0, min(context.spec.collateral.samples, len(task.held_out)))
        )
    )
    scores: dict[str, float] = {}
    failed: dict[str, str] = {}
    for reply in replies:
        if not isinstance(reply, Evaluation):
            return None
        scores |= zip(reply.sample_ids, reply.scores, strict=True)
        failed |= reply.failed_samples
    marked = {sample: failed[sample] for sample, score in scores.items() if math.isnan(score)}
    try:
        context.failed_samples.add(f"collateral {task.name}", marked, len(scores))
    except TooManyFailed as error:
        context.progress.note(f"{candidate} on {task.name} is left out: {error}")
        return None
    return tuple(None if math.isnan(score) else score for score in scores.values())


def _compare_text(context: JobContext, candidate: Candidate, artifact: Artifact | None) -> TextDivergence | None:
    text = context.inputs.other_text
    if text is None or any(isinstance(each, TextTask) for each in context.task.beside):  # judged: half of it held-out
        return None
    request = CompareText(candidate.plan.text, text, candidate.compensation, artifact)
    reply = context.ask_one(request, f"{candidate} on general text")
    return reply if isinstance(reply, TextDivergence) else None
