"""Stage 7: measure what the finalists do to other tasks and to general text, since plans are fitted to one task."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext
from optimizer.stages.verify import Finalist
from workers.messages import Artifact, CompareText, EvaluateOtherTask, Evaluation, TextDivergence
from workers.runtime import SkipPlan
from workers.tasks import Task


@dataclass(frozen=True)
class OtherTask:
    """Accuracy on the held-out split of a task that the plan was not chosen for."""

    n_samples: int
    accuracy: float
    dense_accuracy: float


@dataclass(frozen=True)
class Collateral:
    """A plan's effect beside its task; what could not be measured is left out."""

    tasks: dict[str, OtherTask] = field(default_factory=dict)
    text: TextDivergence | None = None


def run(context: JobContext, finalists: tuple[Finalist, ...]) -> dict[Candidate, Collateral]:
    """Measure what the job asks for beside its task, for every verified plan, or read it back."""
    if not context.inputs.other_tasks and context.inputs.other_text is None:
        return {}
    context.progress.begin("collateral", len(finalists))
    found = {}
    for finalist in finalists:
        measure = partial(_measure, context, finalist)
        found[finalist.candidate] = context.load_or_compute(f"collateral {finalist.candidate}", Collateral, measure)
        context.progress.advance()
    return found


def _measure(context: JobContext, finalist: Finalist) -> Collateral:
    candidate, artifact = finalist.candidate, finalist.artifact
    others: dict[str, OtherTask] = {}
    for task in context.inputs.other_tasks:
        result, dense = _evaluate(context, candidate, artifact, task), _dense(context, task)
        if result is not None and dense is not None:
            others[task.name] = OtherTask(result.n_samples, result.accuracy, dense)
    return Collateral(others, _compare_text(context, candidate, artifact))


def _dense(context: JobContext, task: Task) -> float | None:
    def accuracy() -> float | None:
        candidate = Candidate(SkipPlan.dense(context.worker.num_layers))
        result = _evaluate(context, candidate, None, task)
        return None if result is None else result.accuracy

    known: float | None = context.load_or_compute(f"collateral dense {task.name}", float | None, accuracy)
    return known


def _evaluate(context: JobContext, candidate: Candidate, artifact: Artifact | None, task: Task) -> Evaluation | None:
    request = EvaluateOtherTask(
        candidate.plan.text, task, context.spec.collateral.samples, candidate.compensation, artifact
    )
    reply = context.ask_one(request, f"{candidate} on {task.name}")
    return reply if isinstance(reply, Evaluation) else None


def _compare_text(context: JobContext, candidate: Candidate, artifact: Artifact | None) -> TextDivergence | None:
    text = context.inputs.other_text
    if text is None:
        return None
    request = CompareText(candidate.plan.text, text, candidate.compensation, artifact)
    reply = context.ask_one(request, f"{candidate} on general text")
    return reply if isinstance(reply, TextDivergence) else None
