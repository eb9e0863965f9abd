"""Stages of a lossless job: who may draft, what is published, and what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import in_process
import pytest

from optimizer.search.space import Candidate
from optimizer.stages import dense_answers, publish, redundancy, speculate
from optimizer.stages.collateral import Collateral, OffTask
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.verify import Finalist
from optimizer.verification.verdict import DraftFigures, Verdict
from storage.database import Database
from storage.records import plans
from workers.messages import (
    AnswerDense,
    CheckSpeculation,
    CompareSpeculation,
    DenseAnswers,
    Evaluation,
    Exactness,
    Failure,
    LatencyComparison,
    Reply,
    Request,
    SpeculationComparison,
    Workload,
)
from workers.runtime import SkipPlan

FAST, CAREFUL = "R" * 6 + "S" * 6, "R" * 11 + "S"
NAMES = tuple(f"held_out-{number}" for number in range(8))
JOB: dict[str, Any] = {
    "mode": "lossless",
    "task": "scenes",
    "actions": ["skip"],
    "workload": {"new_tokens": 12},
    "splits": {"calibration": 6, "search": 4, "held_out": 8, "unit": "samples"},
}


def compared(plan: str, exactness: Exactness, speedup: float = 1.5) -> SpeculationComparison:
    low, high = 0.98 * speedup, 1.02 * speedup
    timed = LatencyComparison(plan, "device", Workload(1, 12), 1.0, 1 / speedup, speedup, low, high, 9, 8, 12)
    return SpeculationComparison(timed, 1.7, 1.6, 1.8, 0.01, 0.006, 0.9, 90, 30, 80, 60, 2, 4096, exactness)


class Scripted:
    """Workers that answer as they are told; the rest is a real one's."""

    size = 1

    def __init__(self, worker: in_process.OneWorker, answer: Callable[[Request], Reply | Failure]) -> None:
        self.info, self._answer = worker.info, answer
        self.requests: list[Request] = []

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply | Failure]]:
        for number, request in enumerate(requests):
            self.requests.append(request)
            if isinstance(request, AnswerDense):
                yield number, dense(request)
            else:
                yield number, self._answer(request)


def dense(request: AnswerDense) -> DenseAnswers:
    count = request.stop - request.start
    ids = tuple(f"{request.split}-{number}" for number in range(count))
    found = Evaluation("R" * 12, request.split, ids, (1.0,) * count, {"token_f1": 1.0}, {}, 1.0)
    return DenseAnswers(found, ((5, 6, 7, 2),) * count)


@pytest.fixture
def job(store: Database, worker: in_process.OneWorker) -> Callable[..., tuple[JobContext, Scripted]]:
    def job(answer: Callable[[Request], Reply | Failure]) -> tuple[JobContext, Scripted]:
        scripted = Scripted(worker, answer)
        return in_process.context(store, scripted, in_process.spec(**JOB)), scripted  # type: ignore[arg-type]

    return job


def finalist(plan: str, acceptance: float = 0.95) -> Finalist:
    figures = DraftFigures(acceptance, 0.9, 0.97, 8, 3, 2.8, 0.7)
    accuracy = (1.0, 0.7, 1.0, 1.0, 0.0, 0.0, 0.0, 0.95, 0.95, 1.0)
    return Finalist(Verdict(plan, 8, 8, *accuracy, True, {"token_f1": 1.0}, drafting=figures))


def test_a_model_that_cannot_draft_ends_the_job_before_anything_is_computed(job: Callable[..., Any]) -> None:
    reason = "layer 1 keeps its state in a LinearAttentionLayer"
    context, workers = job(lambda request: Failure(request, reason, 1))
    with pytest.raises(JobFailed, match=f"mode: lossless cannot be had of this model: {reason}"):
        speculate.require_drafting(context)
    asked = workers.requests[-1]
    assert isinstance(asked, CheckSpeculation) and asked.targets == ((5, 6, 7, 2),)


def test_the_first_sample_that_dense_answered_is_drafted(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(count: int) -> Callable[[AnswerDense], DenseAnswers]:
        def answer(request: AnswerDense) -> DenseAnswers:
            found = whole(request)
            failed = dict.fromkeys(found.evaluation.sample_ids[:count], "not an image")
            tokens = (None,) * count + found.tokens[count:]
            return DenseAnswers(replace(found.evaluation, failed_samples=failed), tokens)

        return answer

    whole = dense
    monkeypatch.setitem(globals(), "dense", failing(2))
    context, workers = job(lambda request: Exactness(NAMES[2:3]))
    speculate.require_drafting(context)
    asked = workers.requests[-1]
    assert isinstance(asked, CheckSpeculation) and (asked.start, asked.stop) == (2, 3)
    assert asked.targets == ((5, 6, 7, 2),)


def test_a_model_that_answers_nothing_ends_the_job(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dense

    def answer(request: AnswerDense) -> DenseAnswers:
        found = whole(request)
        failed = {found.evaluation.sample_ids[0]: "not an image"}
        return DenseAnswers(replace(found.evaluation, failed_samples=failed), (None,) * len(found.tokens))

    monkeypatch.setitem(globals(), "dense", answer)
    context, _ = job(lambda request: Exactness())
    with pytest.raises(JobFailed, match="answered none of the first 8 held-out samples: not an image"):
        speculate.require_drafting(context)


def test_redundancy_is_shared_between_modes_and_acceptances_by_targets_alone(
    job: Callable[..., Any], store: Database, worker: in_process.OneWorker
) -> None:
    context, _ = job(lambda request: Exactness())
    standalone = in_process.context(store, worker, in_process.spec(**(JOB | {"mode": "standalone"})))
    assert redundancy.measurement_key(context) == redundancy.measurement_key(standalone)
    own, alone = (dense_answers.evaluation_settings(each, "search") for each in (context, standalone))
    again, _ = job(lambda request: Exactness())
    assert own == dense_answers.evaluation_settings(again, "search") != alone


def test_acceptances_to_other_targets_are_others(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dense
    context, _ = job(lambda request: Exactness())
    own = dense_answers.evaluation_settings(context, "search")

    def answer(request: AnswerDense) -> DenseAnswers:
        found = whole(request)
        return DenseAnswers(found.evaluation, (*found.tokens[:-1], (5, 6, 8, 2)))

    monkeypatch.setitem(globals(), "dense", answer)
    other, _ = job(lambda request: Exactness())
    assert dense_answers.evaluation_settings(other, "search") != own


def test_a_plan_with_another_answer_than_dense_is_not_published(job: Callable[..., Any], store: Database) -> None:
    def answer(request: Request) -> Reply:
        assert isinstance(request, CompareSpeculation | CheckSpeculation)
        if isinstance(request, CompareSpeculation):
            return compared(request.plan, Exactness(NAMES[1:7], near_ties=("held_out-3",)))
        return Exactness(NAMES, different=("held_out-5",) if request.plan == FAST else ())

    context, workers = job(answer)
    chosen = (finalist(FAST), finalist(CAREFUL))
    found = speculate.run(context, chosen)
    assert [each.plan.text for each in found] == [CAREFUL]
    measured = publish.Measured({each: own.latency for each, own in found.items()}, speculation=found)
    result = publish.run(context, chosen, measured)
    (published,) = plans.for_job(store, context.job.id)
    assert result.plan_ids == (published.id,) and result.best == published.id
    own = published.secondary["lossless"]
    assert (published.plan, published.mode, published.extra_bytes) == (CAREFUL, "lossless", 4096)
    assert (own["answers_compared"], own["near_ties"], own["acceptance"]) == (8, 1, 0.95)
    checked = [each for each in workers.requests if isinstance(each, CheckSpeculation)]
    assert [(each.start, each.stop, len(each.targets)) for each in checked] == [(0, 8, 8)] * 2
    speculate.run(context, chosen)  # resumed: read back, not measured again
    assert len([each for each in workers.requests if isinstance(each, CompareSpeculation)]) == 2


def test_a_job_whose_plans_all_answer_otherwise_fails_with_the_sample(job: Callable[..., Any]) -> None:
    context, _ = job(
        lambda request: (
            compared(request.plan, Exactness(NAMES[1:7]))
            if isinstance(request, CompareSpeculation)
            else Exactness(NAMES, different=("held_out-5",))
        )
    )
    with pytest.raises(JobFailed, match="1 of 8 answers were not the dense model's, the first to held_out-5"):
        speculate.run(context, (finalist(FAST),))


def test_another_answer_on_prompts_of_other_tasks_keeps_a_plan_back_too(
    job: Callable[..., Any], store: Database
) -> None:
    context, _ = job(lambda request: Exactness())
    chosen = (finalist(FAST), finalist(CAREFUL))
    drafted = {each.candidate: compared(each.candidate.plan.text, Exactness(NAMES)) for each in chosen}
    exact = OffTask(5, 0.3, 1.0, 0.9, 1.1, 1.0, 0.9, 1.1, Exactness(NAMES[:5]))
    beside = {
        Candidate(SkipPlan.parse(FAST)): Collateral(
            off_task={"vqa": replace(exact, exactness=Exactness(NAMES[:5], (), ("q",)))}
        ),
        Candidate(SkipPlan.parse(CAREFUL)): Collateral(off_task={"vqa": exact}),
    }
    latency = {each: own.latency for each, own in drafted.items()}
    publish.run(context, chosen, publish.Measured(latency, collateral=beside, speculation=drafted))
    (published,) = plans.for_job(store, context.job.id)
    assert published.plan == CAREFUL
    assert published.secondary["lossless"]["off_task"]["vqa"]["answers_compared"] == 5


def test_a_job_whose_plans_all_answer_otherwise_on_other_tasks_fails_with_the_prompt(job: Callable[..., Any]) -> None:
    context, _ = job(lambda request: Exactness())
    chosen = finalist(FAST)
    drafted = {chosen.candidate: compared(FAST, Exactness(NAMES))}
    other = OffTask(5, 0.3, 1.0, 0.9, 1.1, 1.0, 0.9, 1.1, Exactness(NAMES[:5], (), ("q",)))
    beside = {chosen.candidate: Collateral(off_task={"vqa": other})}
    latency = {chosen.candidate: drafted[chosen.candidate].latency}
    with pytest.raises(JobFailed, match=f"plan {FAST} is not published: on vqa 1 of 5 answers .*, the first to q"):
        publish.run(context, (chosen,), publish.Measured(latency, collateral=beside, speculation=drafted))
