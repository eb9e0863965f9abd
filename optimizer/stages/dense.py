"""Stage 2: check that the dense model can do the task, before anything is spent on finding plans for it.

Its evaluation on the search split is the one that the search compares with; in a lossless job its answers are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimizer.errors import UsageFault
from optimizer.search.budget import rung_sizes
from optimizer.search.space import Candidate
from optimizer.stages import dense_answers
from optimizer.stages.cached_evaluation import CachedEvaluation
from optimizer.stages.context import JobContext, JobFailed
from workers.messages import ShownSample, ShownSamples, ShowSamples
from workers.runtime import SkipPlan
from workers.tasks import Task
from workers.tasks.chance import chance

LOOKED_AT = 16
"""Samples whose answers are looked at, where too few of all are right."""
SHOWN = 3
LONGEST_TEXT = 300


class UselessModel(UsageFault):
    """The dense model's answers on the task are worth nothing; the details show some."""


@dataclass(frozen=True)
class DenseCheck:
    """The dense model's accuracy on the search splits, and what is wrong with its answers (empty: nothing)."""

    n_samples: int
    accuracy: float
    chance: float
    warning: str


def run(context: JobContext) -> DenseCheck:
    """Check the dense model, or read the check back.

    Raises :class:`UselessModel` where it is below ``min_dense_accuracy``, or useless and no such limit is set.
    """
    context.progress.begin("check dense", 1)
    check = _known(context)
    context.progress.advance(news=f"accuracy {check.accuracy:.3f}")
    if check.warning:
        context.progress.note(f"warning: {check.warning}")
    return check


def warn(context: JobContext) -> str:
    """Check the dense model for a command that publishes no plan; return what is wrong with its answers, if anything.

    What it measures is nothing that anybody should act on then, but not wrong, so the command goes on.
    """
    context.progress.begin("check dense", 1)
    found = _find_all(context)
    context.progress.advance(news=", ".join(f"accuracy {each.accuracy:.3f}" for each in found))
    reasons = "; ".join(_named(found, each, reason) for each in found for reason in each.reasons)
    return f"{reasons}: what is measured of its layers says little about the task" if reasons else ""


def _known(context: JobContext) -> DenseCheck:
    return context.load_or_compute("dense", DenseCheck, lambda: _check(context))


def _check(context: JobContext) -> DenseCheck:
    found, floor = _find_all(context), context.spec.constraint.min_dense_accuracy
    wrong = [each for each in found if each.below_floor or (each.findings and not each.goes_on_anyway(floor))]
    if wrong:
        raise UselessModel(
            f"task {' and '.join(each.task for each in wrong)}, model {context.spec.model.path}: "
            f"{'; '.join(reason for each in wrong for reason in each.reasons)}; check the task's "
            "prompt, answers and metric (constraint.min_dense_accuracy: 0 goes on anyway)",
            [describe(each) for each in _worst(wrong[0].looked_at)],
        )
    n = sum(each.n_samples for each in found)
    return DenseCheck(
        n,
        math.fsum(each.n_samples * each.accuracy for each in found) / n,
        math.fsum(each.n_samples * each.chance for each in found) / n,
        "; ".join(_named(found, each, finding) for each in found for finding in each.findings),
    )


@dataclass(frozen=True)
class _Found:
    """The dense model's accuracy on a task's search split, what is wrong with its answers, and those looked at."""

    task: str
    n_samples: int
    accuracy: float
    chance: float
    below_floor: str
    """That it is below ``min_dense_accuracy``, in words; empty where it is not."""
    findings: tuple[str, ...]
    looked_at: tuple[ShownSample, ...]

    @property
    def reasons(self) -> list[str]:
        """All that is wrong."""
        return [*filter(None, [self.below_floor]), *self.findings]

    def goes_on_anyway(self, floor: float | None) -> bool:
        """Whether the job was told to go on with a model that is no better than chance."""
        return floor is not None and floor <= self.chance


def _named(found: Sequence[_Found], each: _Found, finding: str) -> str:
    """Name the task of a finding where there are several."""
    return finding if len(found) == 1 else f"task {each.task}: {finding}"


def _find_all(context: JobContext) -> list[_Found]:
    """Look at the dense model on each of the job's tasks."""
    if not context.task.parts:
        return [_find(context, context.task, "")]
    return [_find(context, part, part.name) for part in context.task.parts]


def _find(context: JobContext, task: Task, name: str) -> _Found:
    dense = Candidate(SkipPlan.dense(context.worker.num_layers))
    if name or context.goals is not None:
        n_samples = first = len(task.search)
    else:
        rungs = rung_sizes(context.spec.search.rungs, len(task.search))
        n_samples, first = rungs[-1], rungs[0]
    if context.spec.is_lossless:
        values = dense_answers.run(context, "search").scores
    else:
        evaluate = CachedEvaluation(context, "search", task=task if name else None)
        ((_, scores),) = evaluate([(dense, n_samples)])
        if scores.failure is not None:
            raise JobFailed(f"the dense model cannot be evaluated: {scores.failure}")
        values = scores.values
    if all(map(math.isnan, values[:first])):
        raise JobFailed(f"search.rungs: all of the first {first} samples failed; begin with a larger number")
    floor = context.spec.constraint.min_dense_accuracy
    samples = task.search[:n_samples]
    answered = {s: score for s, score in zip(samples, values, strict=True) if not math.isnan(score)}
    accuracy = math.fsum(answered.values()) / len(answered)
    blind = chance(task.spec, list(answered))
    is_above_chance = accuracy > blind.score
    findings = [] if is_above_chance else [not_above_chance(accuracy, n_samples, "search", blind.score, blind.means)]
    below_floor = ""
    if floor is not None and accuracy < floor:
        below_floor = (
            f"the dense model's {accuracy:.3f} on {n_samples} search samples is below min_dense_accuracy {floor}"
        )
    looked_at: tuple[ShownSample, ...] = ()
    if findings or below_floor or sum(score == 1 for score in answered.values()) < len(answered) / 2:
        looked_at = _look_at(context, n_samples, name)
        findings += _odd_answers(task, looked_at)
    return _Found(task.name, n_samples, accuracy, blind.score, below_floor, tuple(findings), looked_at)


def not_above_chance(accuracy: float, n_samples: int, split: str, score: float, means: str) -> str:
    """Say that the dense model is not above chance."""
    return (
        f"the dense model is not above chance: accuracy {accuracy:.3f} on {n_samples} {split} samples, "
        f"{means} gives {score:.3f}"
    )


def warning_of(context: JobContext, accuracies: Mapping[str, tuple[float, int]]) -> str:
    """Return what is wrong with the dense model by the check, else by its accuracies on the held-out splits.

    These come with the numbers of samples, by the name of the task.
    """
    warning = _known(context).warning
    if warning:
        return warning
    found = []
    for task in context.task.parts or (context.task,):
        accuracy, n_samples = accuracies[task.name]
        blind = chance(task.spec, task.held_out)
        if accuracy <= blind.score:
            said = not_above_chance(accuracy, n_samples, "held-out", blind.score, blind.means)
            found.append(f"task {task.name}: {said}" if context.task.parts else said)
    return "; ".join(found)


def _look_at(context: JobContext, n_samples: int, task: str) -> tuple[ShownSample, ...]:
    """Show samples spread over the search split; none where that fails, which is noted."""
    indices = sorted({number * n_samples // LOOKED_AT for number in range(LOOKED_AT)})
    reply = context.ask_one(ShowSamples("search", tuple(indices), task=task), "answers of the dense model")
    return reply.samples if isinstance(reply, ShownSamples) else ()


def _odd_answers(task: Task, looked_at: Sequence[ShownSample]) -> list[str]:
    """Say what is odd about answers: all equal where different ones are accepted, or all cut and not right."""
    answered = [each for each in looked_at if each.answer is not None]
    found = []
    accepted = {frozenset(each.accepted) for each in answered}
    if len({each.answer for each in answered}) == 1 and not frozenset.intersection(*accepted):
        found.append(f"the dense model answers {answered[0].answer!r} to all of {len(answered)} different samples")
    if answered and all(each.cut for each in answered) and any(each.score != 1 for each in answered):
        limit = task.spec.answer.max_new_tokens
        found.append(f"all of {len(answered)} answers are cut at answer.max_new_tokens: {limit}")
    return found


def _worst(looked_at: Sequence[ShownSample]) -> list[ShownSample]:
    return sorted(looked_at, key=lambda each: each.score or 0.0)[:SHOWN]


def describe(each: ShownSample) -> str:
    """Describe a sample in a line: prompt, options, answer, accepted answers."""
    options = f", options {_short(list(each.choices))}" if each.choices else ""
    answer = f"failed: {each.failure}" if each.answer is None else f"answer {_short(each.answer)}"
    cut = " (cut)" if each.cut else ""
    accepted = " or ".join(map(_short, dict.fromkeys(each.accepted)))
    return f"sample {each.id}: prompt {_short(each.prompt)}{options}, {answer}{cut}, accepted {accepted}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 4]} ..."
