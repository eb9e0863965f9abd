"""The guards of a job: what is fitted and published, read back, and said where none can be fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch

from optimizer.job.inputs import prepare
from optimizer.preflight.checks import too_few_to_guard
from optimizer.reports import formatting
from optimizer.search.space import Candidate
from optimizer.stages import guard, publish
from optimizer.stages.context import JobContext
from optimizer.stages.verify import Chosen, Finalist
from optimizer.verification.verdict import verify
from storage.database import Database
from storage.records import plans
from workers.compensation import store as artifacts
from workers.device import lock
from workers.errors import MeasurementError
from workers.guard import fitter
from workers.messages import Artifact, FitGuards, LatencyComparison, SentAway, Workload
from workers.runtime import SkipPlan
from workers.runtime.guard import Guard
from workers.tasks import load_spec, load_task
from workers.tasks.images import ImageFile

PLAN = "R" * 6 + "S" * 6


@pytest.fixture(scope="module")
def worker() -> in_process.OneWorker:
    return in_process.OneWorker("llava-12", prepare(job()).task)


def job(**fields: Any) -> Any:
    sizes = {"calibration": 24, "search": 30, "held_out": 20, "unit": "images"}
    return in_process.spec(**{"splits": sizes, "guard": {"false_alarms": 0.05}, **fields})


def finalists(context: JobContext) -> tuple[Finalist, ...]:
    held_out = [sample.image_key for sample in context.task.held_out]
    right = [1.0] * len(held_out)
    return tuple(map(Finalist, verify(right, {PLAN: right}, held_out, context.spec.constraint, seed=0)))


def timed(context: JobContext) -> LatencyComparison:
    return LatencyComparison(PLAN, context.worker.device, Workload(1, 2), 1.0, 0.5, 2.0, 1.9, 2.1, 9, 8, 4)


def published(context: JobContext) -> dict[str, Any]:
    chosen = finalists(context)
    measured = publish.Measured(
        {chosen[0].candidate: timed(context)}, guards=guard.run(context, [Chosen(each.candidate) for each in chosen])
    )
    found: dict[str, Any] = plans.get(context.db, publish.run(context, chosen, measured).plan_ids[0]).secondary
    return found


def test_a_plan_is_published_with_a_guard_that_tells_others_apart(
    store: Database, worker: in_process.OneWorker, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(
        "the licence grants rights to use copy and change the work as it stands here " * 40
    )
    beside = {"tasks": ["scenes"], "text": str(tmp_path / "text.txt"), "samples": 20}
    context = in_process.context(store, worker, job(artifacts=str(tmp_path / "kept"), collateral=beside))
    found = published(context)["guard"]
    read = Guard.read(artifacts.get(Artifact(found["artifact"], found["checksum"])))
    assert (
        (read.layer, read.fitted_on, read.threshold_on)
        == (2, 24, 30)
        == (
            found["layer"],
            found["fitted_on"],
            found["threshold_on"],
        )
    )
    assert read.model_fingerprint == context.worker.fingerprint
    for others in (found["tasks"]["scenes"], found["text"]):
        assert others["prompts"] == 20 and others["sent"] >= 0.95
        assert others["low"] <= others["sent"] <= others["high"] == 1.0
    assert found["held_out"]["prompts"] == 20 and found["held_out"]["sent"] <= 0.3
    assert 0 < found["score_seconds"] < found["decision_seconds"]
    asked = len(worker.requests)
    assert published(context)["guard"] == found and len(worker.requests) == asked  # resumed: read back


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_sample_of_another_task_that_fails_costs_no_guard(
    store: Database, worker: in_process.OneWorker, tmp_path: Path, share: float
) -> None:
    """The first three samples are asked about two images: the one that is gone is one of three samples."""
    other = load_task(load_spec("easy-vqa").with_splits(calibration=1, search=1, held_out=6))
    first, last = other.held_out[0], other.held_out[-1]
    gone = replace(first, id="gone", image_key="gone", image=ImageFile(str(tmp_path / "gone.png")))
    same, beyond = replace(first, id="again"), replace(gone, id="beyond", image_key="beyond")
    other = replace(other, spec=other.spec.changed(name="my_other"), held_out=(first, gone, same, beyond, last))
    wanted = job(max_failed_samples=share, artifacts=str(tmp_path / "kept"), collateral={"samples": 3})
    context = in_process.context(store, worker, wanted)
    context = replace(context, inputs=replace(context.inputs, other_tasks=(other,)))
    found = published(context)["guard"]
    assert set(context.failed_samples.of("collateral my_other")) == {"gone"}
    assert "checksum" in found and found["held_out"]["prompts"] == 20
    assert {name: sent["prompts"] for name, sent in found["tasks"].items()} == ({"my_other": 1} if share else {})


def test_too_few_images_are_said_with_how_many_it_takes(store: Database, worker: in_process.OneWorker) -> None:
    needs = "guard.false_alarms: 0.01 needs 99 images in the search split, which has 30"
    context = in_process.context(store, worker, job(guard={}))
    assert published(context)["guard"] == {"note": f"{needs}; raise splits.search, or the rate to 0.0323"}
    assert not any(isinstance(each, FitGuards) and each.false_alarms == 0.01 for each in worker.requests)
    assert too_few_to_guard(context.spec, context.task)[0].startswith(f"plans get no guard: {needs}")
    assert too_few_to_guard(job(), context.task) == []


def test_no_guard_is_fitted_where_none_is_asked_for(store: Database, worker: in_process.OneWorker) -> None:
    context = in_process.context(store, worker, job(guard={"false_alarms": None}))
    assert "guard" not in published(context)


def test_the_net_speedup_is_that_of_the_expected_request() -> None:
    """Of 100 prompts 4 take the decision (0.1 s) and dense (1 s), 96 the plan (0.5 s) and the score (0.01 s)."""
    kept = guard.KeptGuard(Artifact("", ""), 1, 0.01, 9, 9, SentAway(100, 4), {}, None, 0.1, 0.01)
    latency = LatencyComparison(PLAN, "cpu", Workload(), 1.0, 0.5, 2.0, 1.9, 2.1, 9, 8, 4)
    assert kept.net_speedup(latency) == pytest.approx(100 / (4 * 1.1 + 96 * 0.51))


def test_of_batches_no_net_speedup_is_given() -> None:
    """One prompt outside sends its whole batch to dense, and nothing was timed or counted of batches."""
    kept = guard.KeptGuard(Artifact("", ""), 2, 0.01, 9, 9, SentAway(100, 4), {}, None, 0.1, 0.01)
    guards, candidate = guard.Guards({2: kept}), Candidate(SkipPlan.parse(PLAN))
    single = LatencyComparison(PLAN, "cpu", Workload(1), 1.0, 0.5, 2.0, 1.9, 2.1, 9, 8, 4)
    timings = (single, replace(single, workload=Workload(8)))
    known = [guard.figures(guards, candidate, each, 0.95) for each in timings]
    assert known[0] == {**known[1], "net_speedup": kept.net_speedup(single)} and "net_speedup" not in known[1]
    assert formatting.net_speedup(known[1]) == formatting.NOT_MEASURED


def test_decisions_are_timed_alone_on_the_device(worker: in_process.OneWorker) -> None:
    """Another worker may compute beside the fit; what is timed waits for it, and is refused where it does not end."""
    device = worker.handler.loaded.device
    task = prepare(job()).task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitter, "task_features", lambda _, task, samples, layers: ({2: torch.randn(len(samples), 8)}, {}))
        patch.setitem(lock.timing.__wrapped__.__kwdefaults__, "wait_seconds", 0.1)  # type: ignore[attr-defined]
        with lock.computing(device), pytest.raises(MeasurementError, match="other workers kept using"):
            worker.handler.with_task(task).handle(FitGuards((2,), 0.05))


def test_jobs_of_before_there_were_guards_are_found_again() -> None:
    assert "guard" not in job(guard={}).canonical()
    assert job().canonical()["guard"] == {"false_alarms": 0.05}
