"""Stage 5: verify the front's plans against dense on the held-out split, which the search never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from optimizer.search.latency import LayerTimes
from optimizer.search.space import Candidate
from optimizer.search.trial import Scores, SearchOutcome
from optimizer.stages import compensate, dense_answers
from optimizer.stages.compensate import KeptMaps
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.goal_evaluation import GoalEvaluation
from optimizer.stages.search import drafting_of, limits_of
from optimizer.verification.drafting import DenseFigures, Drafted, verify_drafters
from optimizer.verification.finalists import choose_finalists, why_none
from optimizer.verification.goals import HeldOut, verify_goals
from optimizer.verification.verdict import Verdict, verify
from workers.messages import NO_COMPENSATION, Artifact
from workers.runtime import SkipPlan
from workers.tasks import Sample
from workers.tasks.passages import Passage


@dataclass(frozen=True)
class Chosen:
    """A candidate that the search chose to be verified and measured, with its maps if its gaps are compensated."""

    candidate: Candidate
    maps: KeptMaps | None = None

    @property
    def artifact(self) -> Artifact | None:
        """The file of its maps."""
        return None if self.maps is None else self.maps.artifact


@dataclass(frozen=True)
class Finalist:
    """A verified candidate: its held-out figures, and its maps if its gaps are compensated."""

    verdict: Verdict
    maps: KeptMaps | None = None

    @property
    def candidate(self) -> Candidate:
        """The candidate itself."""
        return self.verdict.candidate

    @property
    def artifact(self) -> Artifact | None:
        """The file of its maps."""
        return None if self.maps is None else self.maps.artifact


def choose(context: JobContext, profile: LayerTimes, outcome: SearchOutcome) -> tuple[Chosen, ...]:
    """Choose the candidates to verify, and fit the maps of the compensated. Empty when the search left none worth it.

    Raises JobFailed where none of those that it left can be fitted.
    """
    found = choose_finalists(outcome, limits_of(context, profile), context.spec.search.finalists)
    maps = compensate.run(context, found)
    chosen = tuple(Chosen(e, maps.get(e)) for e in found if e in maps or e.compensation == NO_COMPENSATION)
    if found and not chosen:
        raise JobFailed(f"none of the {len(found)} plans that the search chose could be fitted")
    return chosen


def run(context: JobContext, profile: LayerTimes, chosen: tuple[Chosen, ...]) -> tuple[Finalist, ...]:
    """Verify what was chosen, or read the verdicts back."""
    context.progress.begin("verify held-out", len(chosen) + 1)
    verdicts = context.load_or_compute("verify", tuple[Verdict, ...], lambda: _verify(context, profile, chosen))
    maps = {each.candidate: each.maps for each in chosen}
    return tuple(Finalist(verdict, maps[verdict.candidate]) for verdict in verdicts)


def why_nothing(context: JobContext, profile: LayerTimes, outcome: SearchOutcome) -> str:
    """Explain why the search left no plan worth verifying."""
    return why_none(outcome, limits_of(context, profile))


def _verify(context: JobContext, profile: LayerTimes, chosen: Sequence[Chosen]) -> tuple[Verdict, ...]:
    dense = Candidate(SkipPlan.dense(context.worker.num_layers))
    scores: dict[Candidate, Scores] = {}
    evaluate = GoalEvaluation(context, "held_out", {e.candidate: e.artifact for e in chosen if e.artifact is not None})
    asked = [each.candidate for each in chosen]
    for candidate, result in evaluate([(each, len(context.task.held_out)) for each in (dense, *asked)]):
        context.progress.advance()
        if result.failure is None:
            scores[candidate] = result
        elif candidate == dense:
            raise JobFailed(f"the dense model cannot be evaluated: {result.failure}")
        else:
            context.progress.note(f"plan {candidate} could not be verified: {result.failure}")
    verified = {str(each): each for each in asked if each in scores}
    if not verified:
        raise JobFailed(f"none of the {len(chosen)} plans that the search chose could be verified")
    if context.spec.is_lossless:
        answers = dense_answers.run(context, "held_out")
        return verify_drafters(
            DenseFigures(answers.scores, answers.secondary),
            {each: Drafted(scores[each].values, scores[each].secondary) for each in verified.values()},
            [sample.image_key for sample in context.task.held_out],
            context.spec.constraint,
            drafting_of(context, profile).costs,
            seed=context.spec.search.seed,
        )
    if context.goals is not None:
        return verify_goals(
            [
                HeldOut(each.goal, scores[dense].by_goal[name], _images(each.task.held_out[: each.size("held_out")]))
                for name, each in context.judged.items()
            ],
            {each: scores[each].by_goal for each in verified.values()},
            context.spec.constraint.confidence,
            seed=context.spec.search.seed,
            secondary={each: evaluate.secondary(each) for each in verified.values()},
        )
    verdicts = verify(
        scores[dense].values,
        {name: scores[each].values for name, each in verified.items()},
        [sample.image_key for sample in context.task.held_out],
        context.spec.constraint,
        seed=context.spec.search.seed,
        secondary={name: dict(scores[each].secondary) for name, each in verified.items()},
    )
    return tuple(
        replace(verdict, plan=verified[verdict.plan].plan.text, compensation=verified[verdict.plan].compensation)
        for verdict in verdicts
    )


def _images(samples: Sequence[Sample | Passage]) -> list[str]:
    return [sample.image_key for sample in samples]
