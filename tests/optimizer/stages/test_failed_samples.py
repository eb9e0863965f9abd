"""Samples that fail while a job runs: marked, named, left out for dense and plan alike, and not too many."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest

from optimizer.cli.main import _run
from optimizer.job.result import load_result
from optimizer.job.sections import ConstraintSpec
from optimizer.reports.html import write_report
from optimizer.search.space import Candidate
from optimizer.search.trial import Scores, trial_of
from optimizer.stages import collateral, compensate, dense, measure, profile, redundancy
from optimizer.stages.cached_evaluation import CachedEvaluation
from optimizer.stages.collateral import OtherTask
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.failed_samples import TooManyFailed
from optimizer.stages.verify import Chosen, Finalist
from optimizer.verification.verdict import verify
from storage.database import Database
from storage.queue import events, leases
from workers.compensation.compensator import Compensator
from workers.evaluation.plain import PlainEvaluator
from workers.messages import EvaluateOtherTask, EvaluatePlans, FitCompensation, MeasureLinearRedundancy
from workers.runtime import SkipPlan
from workers.tasks import Task, load_spec, load_task
from workers.tasks.images import ImageFile

DENSE = Candidate(SkipPlan.dense(12))
PLAN = Candidate(SkipPlan.parse("RRRRRRSRRRRR"))
SIZES = {"calibration": 10, "search": 20, "held_out": 8, "unit": "samples"}


@pytest.fixture
def begin(store: Database, worker: in_process.OneWorker, tmp_path: Path) -> Callable[..., JobContext]:
    """A job of whose splits some images vanish after it was checked."""

    def begin(gone: dict[str, tuple[int, ...]], **fields: object) -> JobContext:
        wanted = in_process.spec(splits=SIZES, evaluation="plain", **fields)
        other = object.__new__(in_process.OneWorker)
        other.info, other.size, other.requests = worker.info, 1, []
        context = in_process.context(store, other, wanted)
        task = context.task
        for split, places in gone.items():
            task = vanish(task, split, places, tmp_path)
        other.handler = worker.handler.with_task(task)
        return context

    return begin


def vanish(task: Task, split: str, places: tuple[int, ...], directory: Path) -> Task:
    samples = list(task.split(split))
    for place in places:
        samples[place] = replace(samples[place], image=ImageFile(str(directory / "gone.png")))
    return replace(task, **{split: tuple(samples)})


def evaluated(context: JobContext, *asked: tuple[Candidate, int]) -> dict[Candidate, Scores]:
    return dict(CachedEvaluation(context, "search")(list(asked)))


def test_the_job_goes_on_and_names_the_sample_everywhere(
    begin, store: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = begin({"search": (3,)})
    check = dense.run(context)
    assert check.n_samples == 20 and check.accuracy > 0.8
    scores = evaluated(context, (DENSE, 20), (PLAN, 20))
    marked = [[place for place, value in enumerate(each.values) if math.isnan(value)] for each in scores.values()]
    assert marked == [[3], [3]]
    name = context.task.search[3].id
    (event,) = [each for each in events.for_job(store, context.job.id) if each.kind == "sample_failed"]  # once
    assert event.message.startswith(f"search sample {name}: image ") and "gone.png" in event.message
    leases.finish(store, context.job)
    result = load_result(store, context.job.id).to_json()
    assert [(each["split"], each["sample"]) for each in result["failed_samples"]] == [("search", name)]
    page = write_report(store, context.job.id)
    assert "Samples that failed and were left out (1)" in page and name in page and "gone.png" in page
    monkeypatch.setenv("SKIPPLAN_DATABASE", str(store.engine.url))
    assert _run(["jobs", "show", str(context.job.id)]) == 0
    assert event.message in capsys.readouterr().out


def test_growing_prefixes_keep_the_marks(begin) -> None:
    context = begin({"search": (3, 15)}, max_failed_samples=0.1)
    assert [math.isnan(value) for value in evaluated(context, (PLAN, 8))[PLAN].values].count(True) == 1
    whole = evaluated(context, (PLAN, 20))[PLAN].values
    assert [place for place, value in enumerate(whole) if math.isnan(value)] == [3, 15]


@pytest.mark.parametrize(("share", "places", "ends"), [(0.0, (3,), True), (0.1, (3, 5), False), (0.1, (3, 5, 7), True)])
def test_too_many_end_the_job_with_their_list(begin, share: float, places: tuple[int, ...], ends: bool) -> None:
    context = begin({"search": places}, max_failed_samples=share)
    if not ends:
        dense.run(context)
        return
    with pytest.raises(TooManyFailed, match=f"{len(places)} of 20 search samples failed") as raised:
        dense.run(context)
    assert raised.value.exit_code == 1
    assert [line.partition(":")[0] for line in raised.value.details] == [
        f"sample {context.task.search[place].id}" for place in places
    ]


def test_a_first_rung_on_which_no_plan_can_be_compared_is_no_sign_against_plans(begin) -> None:
    with pytest.raises(JobFailed, match=r"search\.rungs: all of the first 1 samples failed"):
        dense.run(begin({"search": (0,)}, search={"rungs": [1, 20]}))


def test_another_job_evaluates_anew(begin) -> None:
    evaluated(begin({"search": (3,)}), (DENSE, 20))
    context = begin({})
    assert not any(map(math.isnan, evaluated(context, (DENSE, 20))[DENSE].values))
    assert [type(each) for each in context.pool.requests] == [EvaluatePlans]


def test_an_attempt_knows_what_failed_before(begin, store: Database) -> None:
    context = begin({"search": (3,)})
    evaluated(context, (DENSE, 20))
    again = JobContext(store, context.job, context.inputs, context.pool, context.progress)
    assert again.failed_samples.of("search") == context.failed_samples.of("search") != {}


def test_measuring_and_timing_leave_them_out(begin, store: Database) -> None:
    fields: dict[str, Any] = {"criterion": "block-influence", "actions": ["skip"], "workload": {"new_tokens": 1}}
    context = begin({"calibration": (0,)}, **fields)
    profile.run(context)
    name = context.task.calibration[0].id
    assert list(context.failed_samples.of("calibration")) == [name]
    key = redundancy.measurement_key(context)
    table = redundancy.run(context)
    assert table.rows and list(context.failed_samples.of("calibration")) == [name]
    assert key == redundancy.measurement_key(context) != redundancy.measurement_key(begin({}, **fields))
    events_of = [each.message for each in events.for_job(store, context.job.id) if each.kind == "sample_failed"]
    assert len(events_of) == 1


RECIPE = "linear ridge=0.001 weighting=answers tokens=16384"
COMPENSATED = Candidate(PLAN.plan, RECIPE)


def without(task: Task, split: str, place: int) -> Task:
    samples = task.split(split)
    return replace(task, **{split: samples[:place] + samples[place + 1 :]})


def test_maps_are_fitted_without_them_and_belong_to_this_job_alone(
    begin, store: Database, worker: in_process.OneWorker, tmp_path: Path
) -> None:
    context = begin(
        {"calibration": (1,)}, compensation={"kind": "linear", "text_share": 0}, artifacts=str(tmp_path / "maps")
    )
    name = context.task.calibration[1].id
    evaluated(context, (COMPENSATED, 8))  # by maps that the worker fits on the way
    assert list(context.failed_samples.of("calibration")) == [name]
    kept = compensate.run(context, [COMPENSATED])[COMPENSATED]
    fits = [
        Compensator(worker.handler.loaded, task).fit(FitCompensation(PLAN.plan.text, RECIPE))
        for task in (without(context.task, "calibration", 1), context.task)
    ]
    assert (kept.samples, kept.tokens) == (9, fits[0].tokens) != (10, fits[1].tokens)
    shares = [kept.gaps[0].unexplained, *(each.gaps[0].unexplained for each in fits)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3) != pytest.approx(shares[2], rel=1e-3)
    messages = [each.message for each in events.for_job(store, context.job.id) if each.kind == "sample_failed"]
    assert len(messages) == 1 and messages[0].startswith(f"calibration sample {name}: image ")
    another = begin({}, compensation={"kind": "linear", "text_share": 0})
    evaluated(another, (COMPENSATED, 8), (PLAN, 8))
    assert [type(each) for each in another.pool.requests] == [EvaluatePlans, EvaluatePlans]  # nothing is taken over
    third = begin({}, compensation={"kind": "linear", "text_share": 0})
    evaluated(third, (COMPENSATED, 8), (PLAN, 8))
    assert third.pool.requests == []


def test_the_linear_redundancy_is_measured_without_them(begin, worker: in_process.OneWorker) -> None:
    context = begin({"calibration": (1,)})
    table = redundancy.measured(context, [redundancy.LINEAR])
    assert list(context.failed_samples.of("calibration")) == [context.task.calibration[1].id]
    expected = [
        {
            (each.layer, each.end): each.unexplained
            for each in compensator.linear_redundancy(MeasureLinearRedundancy()).shares
        }
        for compensator in (
            Compensator(worker.handler.loaded, task) for task in (without(context.task, "calibration", 1), context.task)
        )
    ]
    found = {(row.layer, row.layer + int(row.name.rpartition("@")[2])): row.value for row in table.rows}
    assert found == pytest.approx(expected[0], rel=1e-3) != pytest.approx(expected[1], rel=1e-3)


def finalist(plan: Candidate) -> Finalist:
    scores = {plan.plan.text: [1.0, 0.0]}
    (verdict,) = verify([1.0, 1.0], scores, ["a", "b"], ConstraintSpec(max_accuracy_drop=1), seed=0)
    return Finalist(verdict)


def test_comparing_latency_names_them(begin) -> None:
    context = begin({"calibration": (0,)}, latency={"max_seconds": 0.01}, workload={"new_tokens": 1})
    measured = measure.run(context, (Chosen(PLAN),))[PLAN]
    name = context.task.calibration[0].id
    assert list(measured.failed_samples) == list(context.failed_samples.of("calibration")) == [name]
    assert profile.cache_sizes(begin({"calibration": (0,)}, workload={"new_tokens": 1})).run > 0


class Fading(in_process.OneWorker):
    """Loses the image of a sample once it has been asked about another task for the first time."""

    def __init__(self, worker: in_process.OneWorker, image: Path) -> None:
        self.handler, self.info, self.size, self.requests, self.image = worker.handler, worker.info, 1, [], image

    def run(self, requests):
        for number, request in enumerate(requests):
            with in_process.ONE_AT_A_TIME:
                self.requests.append(request)
                reply = self.handler.handle(request)
                if isinstance(request, EvaluateOtherTask):
                    self.image.unlink(missing_ok=True)
            yield number, reply


@pytest.mark.parametrize("share", [0.2, 0.0])
def test_beside_the_task_plan_and_dense_are_compared_where_neither_failed(
    store: Database, worker: in_process.OneWorker, tmp_path: Path, share: float
) -> None:
    other = load_task(load_spec("easy-vqa").with_splits(calibration=1, search=1, held_out=3))
    place = 2
    copy = shutil.copy(other.held_out[place].image.path, tmp_path / "image.png")
    other = replace(other, spec=other.spec.changed(name="my_other"))
    gone = replace(other.held_out[place], image=ImageFile(str(copy)))
    other = replace(other, held_out=(*other.held_out[:place], gone, *other.held_out[place + 1 :]))
    wanted = in_process.spec(splits=SIZES, max_failed_samples=share)
    context = in_process.context(store, Fading(worker, tmp_path / "image.png"), wanted)
    context = replace(context, inputs=replace(context.inputs, other_tasks=(other,)))
    (found,) = collateral.run(context, (finalist(PLAN),)).values()
    if not share:  # none may fail: the figure is left out, the job goes on
        assert found.tasks == {}
        return
    kept = [sample for sample in other.held_out if sample.id != gone.id]
    alone = PlainEvaluator(worker.handler.loaded, replace(other, held_out=tuple(kept)))
    plan, dense_ = (alone.evaluate(each.plan, "held_out") for each in (PLAN, DENSE))
    assert found.tasks["my_other"] == OtherTask(len(kept), plan.accuracy, dense_.accuracy)
    (event,) = [each for each in events.for_job(store, context.job.id) if each.kind == "sample_failed"]
    assert event.message.startswith(f"collateral my_other sample {gone.id}: image ")
    assert collateral.run(context, (finalist(PLAN),)) == {PLAN: found}  # read back


# Pairs --------------------------------------------------------------------------------------------------------------

NAN = math.nan


def test_a_trial_is_compared_on_what_both_answered() -> None:
    scores = Scores((1.0, NAN, 0.0, 1.0, 1.0))
    found = trial_of(PLAN, scores, Scores((1.0, 1.0, NAN, 0.0, 1.0, 0.0)), 0.9, 5)
    expected = trial_of(PLAN, Scores((1.0, 1.0, 1.0)), Scores((1.0, 0.0, 1.0)), 0.9, 3)
    assert (found.accuracy, found.difference, found.difference_error) == (
        expected.accuracy, expected.difference, expected.difference_error,
    )  # fmt: skip
    assert found.n_samples == 5 and found.complete


def test_a_verdict_equals_that_on_the_samples_that_both_answered() -> None:
    dense_scores = [1.0, 0.0, NAN, 1.0, 1.0, 1.0, 0.0, 1.0]
    plans = {"RS": [1.0, NAN, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], "SR": [1.0, 1.0, NAN, 1.0, 1.0, 1.0, 1.0, 1.0]}
    images = ["a", "a", "b", "b", "c", "c", "d", "d"]
    both = verify(dense_scores, plans, images, ConstraintSpec(max_accuracy_drop=1), seed=3)
    for verdict, places in zip(both, ([0, 3, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6, 7]), strict=True):
        kept = [[values[place] for place in places] for values in (dense_scores, plans[verdict.plan], images)]
        (alone,) = verify(kept[0], {verdict.plan: kept[1]}, kept[2], ConstraintSpec(max_accuracy_drop=1), seed=3)
        assert (verdict.n_samples, verdict.images) == (len(places), len({images[place] for place in places}))
        assert (verdict.accuracy, verdict.dense_accuracy, verdict.accuracy_low, verdict.mcnemar_p) == (
            alone.accuracy, alone.dense_accuracy, alone.accuracy_low, alone.mcnemar_p,
        )  # fmt: skip
