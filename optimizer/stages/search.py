"""Station 3: propose plans and evaluate them on rungs of the search split."""

from __future__ import annotations

from optimizer import criteria
from optimizer.latency_model import LayerTimes, latency_ratio
from optimizer.search import Search, SearchOutcome, Tried
from optimizer.seeds import nested_sets
from optimizer.space import plan_space
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.evaluate import Evaluator
from workers.scoring.table import LayerTable


def run(context: JobContext, profile: LayerTimes, table: LayerTable) -> SearchOutcome:
    """Search, or read back what the search found.

    An interrupted search is replayed: the same proposals come again, and those evaluated before are read from the
    database instead of being run.
    """
    context.progress.begin("search", context.spec.search.evaluations)
    return context.once("search", SearchOutcome, lambda: _search(context, profile, table))


def _search(context: JobContext, profile: LayerTimes, table: LayerTable) -> SearchOutcome:
    spec = context.spec
    space = plan_space(spec, context.worker)
    risk = criteria.load(spec.criterion, spec.thresholds).risk(table)
    letters = [letter for letter in spec.letters if letter != "R"]
    search = Search(
        space,
        spec.search,
        spec.constraint,
        ratio=lambda plan: latency_ratio(profile, plan),
        seeds=nested_sets(space, risk, limit=max(1, spec.search.evaluations // 2)),
        risk_order=risk.order(letters[-1]),
        samples=len(context.task.search),
        evaluate=Evaluator(context, "search"),
        on_tried=lambda tried: context.progress.advance(news=_news(tried)),
    )
    try:
        return search.run()
    except RuntimeError as error:
        raise JobFailed(str(error)) from None


def _news(tried: Tried) -> str:
    return f"{tried.plan} drop {100 * tried.drop:+.1f} points on {tried.n} samples"
