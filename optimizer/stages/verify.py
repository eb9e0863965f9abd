"""Stage 4: verify the front's plans against dense on the held-out split, which the search never saw."""

from __future__ import annotations

from dataclasses import replace

from optimizer.search.finalists import choose_finalists
from optimizer.search.latency import LayerTimes
from optimizer.search.space import Candidate
from optimizer.search.trial import SearchOutcome
from optimizer.stages import compensate
from optimizer.stages.cached_evaluation import Evaluator
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.search import limits_of
from optimizer.verification.judgement import Verdict, judge
from workers.runtime import SkipPlan


def run(context: JobContext, profile: LayerTimes, outcome: SearchOutcome) -> tuple[Verdict, ...]:
    """Judge the finalists, or read the verdicts back. Empty when the search left no plan worth verifying."""
    finalists = choose_finalists(outcome, limits_of(context, profile), context.spec.search.finalists)
    context.progress.begin("verify held-out", len(finalists) + 1)
    return context.once("verify", tuple[Verdict, ...], lambda: _verify(context, finalists))


def _verify(context: JobContext, finalists: tuple[Candidate, ...]) -> tuple[Verdict, ...]:
    if not finalists:
        return ()
    dense = Candidate(SkipPlan.dense(context.worker.num_layers))
    scores: dict[Candidate, tuple[float, ...]] = {}
    secondary: dict[str, dict[str, float]] = {}
    kept = compensate.run(context, finalists)
    for compensation in dict.fromkeys([dense.compensation, *(each.compensation for each in finalists)]):
        evaluate = Evaluator(context, "held_out", compensation, compensate.artifacts(kept, compensation))
        group = [
            each
            for each in (dense, *finalists)
            if each.compensation == compensation and (each in kept or compensation == dense.compensation)
        ]
        for plan, result in evaluate([(each.plan, len(context.task.held_out)) for each in group]):
            context.progress.advance()
            candidate = Candidate(plan, compensation)
            if result.failure is None:
                scores[candidate] = result.values
                secondary[str(candidate)] = evaluate.secondary[plan.text]
            elif candidate == dense:
                raise JobFailed(f"the dense model cannot be evaluated: {result.failure}")
            else:
                context.progress.note(f"plan {candidate} could not be verified: {result.failure}")
    verified = {str(each): each for each in finalists if each in scores}
    verdicts = judge(
        scores[dense],
        {name: scores[each] for name, each in verified.items()},
        [sample.image_key for sample in context.task.held_out],
        context.spec.constraint,
        seed=context.spec.search.seed,
        secondary=secondary,
    )
    return tuple(
        replace(verdict, plan=verified[verdict.plan].plan.text, compensation=verified[verdict.plan].compensation)
        for verdict in verdicts
    )
