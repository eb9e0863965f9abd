"""Station 4: the front's plans against dense on the held-out split, which the search never saw."""

from __future__ import annotations

from optimizer.search import SearchOutcome, choose_finalists
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.evaluate import Evaluator
from optimizer.verification import Verdict, judge
from workers.runtime import SkipPlan


def run(context: JobContext, outcome: SearchOutcome) -> tuple[Verdict, ...]:
    """Judge the finalists, or read the verdicts back. Empty when the search left no plan worth verifying."""
    finalists = choose_finalists(outcome, context.spec.constraint, context.spec.search.finalists)
    context.progress.begin("verify held-out", len(finalists) + 1)
    return context.once("verify", tuple[Verdict, ...], lambda: _verify(context, finalists))


def _verify(context: JobContext, finalists: tuple[str, ...]) -> tuple[Verdict, ...]:
    if not finalists:
        return ()
    samples = context.task.held_out
    dense = SkipPlan.dense(context.worker.num_layers)
    evaluate = Evaluator(context, "held_out")
    scores: dict[str, tuple[float, ...]] = {}
    for plan, result in evaluate([(each, len(samples)) for each in (dense, *map(SkipPlan.parse, finalists))]):
        context.progress.advance()
        if result.failure is not None:
            if plan == dense:
                raise JobFailed(f"the dense model cannot be evaluated: {result.failure}")
            context.progress.note(f"plan {plan} could not be verified: {result.failure}")
            continue
        scores[plan.text] = result.values
    return judge(
        scores[dense.text],
        {plan: scores[plan] for plan in finalists if plan in scores},
        [sample.image_key for sample in samples],
        context.spec.constraint,
        seed=context.spec.search.seed,
        secondary=evaluate.secondary,
    )
