"""Samples of one request shared by several workers: scores, sums and failures are those of one worker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import in_process
import pytest

from optimizer.job.sections import ConstraintSpec
from optimizer.search.space import Candidate
from optimizer.stages import collateral
from optimizer.stages.cached_evaluation import CachedEvaluation
from optimizer.stages.context import JobContext
from optimizer.stages.verify import Finalist
from optimizer.verification.verdict import verify
from storage.database import Database
from storage.records import evaluations
from workers.messages import EvaluateOtherTask, EvaluatePlans
from workers.runtime import SkipPlan
from workers.tasks import load_spec, load_task
from workers.tasks.images import ImageFile

SAMPLES, LOST = 96, 40
DENSE, PLAN = Candidate(SkipPlan.dense(12)), Candidate(SkipPlan.parse("RRRRRRRFFBSR"))


class Workers(in_process.OneWorker):
    """So many workers as one says, which are one."""

    def __init__(self, worker: in_process.OneWorker, size: int) -> None:
        vars(self).update(vars(worker) | {"size": size, "requests": []})


def lost(context: JobContext) -> list[int]:
    """Places of all samples about the image of one."""
    search = context.task.search
    return [place for place, sample in enumerate(search) if sample.image_key == search[LOST].image_key]


def job(store: Database, worker: in_process.OneWorker, size: int) -> tuple[JobContext, Workers]:
    """A job of which one image is lost once it has begun."""
    sizes = {"calibration": 6, "search": SAMPLES, "held_out": 8, "unit": "samples"}
    workers = Workers(worker, size)
    context = in_process.context(store, workers, in_process.spec(splits=sizes, max_failed_samples=0.1))
    gone = ImageFile("/nowhere/image.png")
    search = tuple(
        replace(each, image=gone) if number in lost(context) else each
        for number, each in enumerate(context.task.search)
    )
    workers.handler = worker.handler.with_task(replace(context.task, search=search))
    return context, workers


def test_a_plans_samples_are_shared_and_its_evaluation_is_the_same(
    store: Database, worker: in_process.OneWorker, tmp_path: Path
) -> None:
    found, asked = {}, {}
    others = [Database.open(f"sqlite:///{tmp_path / name}") for name in ("3.db", "7.db")]  # else scores were known
    with others[0], others[1]:
        for size, where in ((1, store), (3, others[0]), (7, others[1])):
            context, workers = job(where, worker, size)
            list(CachedEvaluation(context, "search")([(DENSE, SAMPLES), (PLAN, SAMPLES)]))
            found[size] = {each.plan: each for each in evaluations.for_job(where, context.job.id, "search")}
            asked[size] = [each for each in workers.requests if isinstance(each, EvaluatePlans)]
            names = {context.task.search[place].id for place in lost(context)}
            assert set(context.failed_samples.of("search")) == names
    assert [len(each.plans) for each in asked[1]] == [2]
    cuts = sorted((each.plans, each.start, each.n_samples or SAMPLES) for each in asked[7])
    assert cuts == sorted(((each.plan.text,), start, start + 32) for each in (DENSE, PLAN) for start in (0, 32, 64))
    together = sorted((each.plans, each.start, each.n_samples or SAMPLES) for each in asked[3])
    assert together == [(asked[1][0].plans, start, start + 32) for start in (0, 32, 64)]  # plans are not parted
    assert set(found[1]) == set(found[3]) == set(found[7]) == {DENSE.plan.text, PLAN.plan.text}
    for plan, alone, shared in [(plan, found[1][plan], found[size][plan]) for plan in found[1] for size in (3, 7)]:
        assert str(shared.scores) == str(alone.scores)  # as text, since NaN is not equal to itself
        assert [place for place, score in enumerate(shared.scores) if score != score] == lost(context)
        assert shared.secondary == pytest.approx(alone.secondary, rel=1e-12)
        executions = shared.layer_executions + shared.layer_executions_saved
        assert executions == alone.layer_executions + alone.layer_executions_saved
        if plan == PLAN.plan.text:  # of dense, which is the reference too, more is run
            assert executions == (SAMPLES - len(lost(context))) * len(PLAN.plan.kept)


def test_samples_of_another_task_are_shared(store: Database, worker: in_process.OneWorker) -> None:
    other = load_task(load_spec("easy-vqa").with_splits(calibration=1, search=1, held_out=80, unit="samples"))
    other = replace(other, spec=other.spec.changed(name="my_other"))
    (verdict,) = verify(
        [1.0, 1.0], {PLAN.plan.text: [1.0, 0.0]}, ["a", "b"], ConstraintSpec(max_accuracy_drop=1), seed=0
    )
    found = {}
    for size in (1, 5):
        context, workers = job(store, worker, size)
        context = replace(context, inputs=replace(context.inputs, other_tasks=(other,)))
        (found[size],) = collateral.run(context, (Finalist(verdict),)).values()
        asked = {(e.start, e.n_samples) for e in workers.requests if isinstance(e, EvaluateOtherTask)}
        assert asked == ({(0, 80)} if size == 1 else {(0, 40), (40, 80)})
    assert found[1] == found[5] and found[1].tasks["my_other"].n_samples == 80


@pytest.mark.parametrize(
    ("size", "requests", "samples"), [(8, 1, 96), (64, 4, 512), (64, 1, 5000), (9, 9, 200), (16, 3, 129)]
)
def test_many_workers_share_samples_in_rounds_of_ever_smaller_slices(
    store: Database, worker: in_process.OneWorker, size: int, requests: int, samples: int
) -> None:
    context, _ = job(store, worker, size)
    found = context.slices(7, 7 + samples, requests=requests)
    assert [place for start, stop in found for place in range(start, stop)] == list(range(7, 7 + samples))
    sizes = [stop - start for start, stop in found]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    if requests == size:
        assert sizes == [samples]  # a worker each
    else:  # what is begun last takes at most a seventh of a worker's part
        assert sizes[-1] <= max(4, samples * requests // size // 7)
        assert len(sizes) < samples / 4 + 1


def test_ten_workers_wait_less_for_the_last_slices_than_for_equal_ones(
    store: Database, worker: in_process.OneWorker
) -> None:
    context, _ = job(store, worker, 10)
    slices = [stop - start for start, stop in context.slices(0, 1000)]

    def ends(sizes: list[int]) -> float:
        """When the last of ten workers ends, of which one is half as fast, if each takes the next slice."""
        free = [0.0] * 10
        for samples in sizes:
            place = free.index(min(free))
            free[place] += samples * (2 if place == 0 else 1)
        return max(free)

    assert ends([100] * 10) == 200
    assert ends(slices) <= 120  # it would be 1000 / 9.5 if nobody waited
