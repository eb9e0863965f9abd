"""What a job measures about the layers, and what it takes from other jobs instead."""

from __future__ import annotations

import in_process
import pytest
from measurement_tables import columns

from optimizer.criteria.evidence import STAGE
from optimizer.stages import profile, redundancy, search
from optimizer.stages.context import JobContext
from storage.database import Database
from storage.queue import stages
from workers.messages import MeasureRedundancy


def asked(worker: in_process.OneWorker) -> list[MeasureRedundancy]:
    found = [request for request in worker.requests if isinstance(request, MeasureRedundancy)]
    worker.requests.clear()
    return found


@pytest.fixture(autouse=True)
def forget(worker: in_process.OneWorker) -> None:
    worker.requests.clear()


def test_a_second_job_on_the_same_model_and_task_measures_nothing(store: Database, worker) -> None:
    first = redundancy.run(in_process.context(store, worker, in_process.spec()))
    assert asked(worker)
    second = redundancy.run(in_process.context(store, worker, in_process.spec(search={"trials": 7})))
    assert asked(worker) == []
    for name, group in columns(first):
        for layer in range(first.num_layers):
            assert second.row(name, group, layer) == first.row(name, group, layer)
    assert set(columns(second)) == set(columns(first))


def test_only_what_is_missing_is_measured(store: Database, worker) -> None:
    context = in_process.context(store, worker, in_process.spec())
    redundancy.measured(context, ("distance",))
    asked(worker)
    table = redundancy.measured(in_process.context(store, worker, in_process.spec()), ("distance", "attention"))
    assert {request.kinds for request in asked(worker)} == {("attention",)}
    assert table.has("cosine_distance", "vision") and table.has("vision_attention", "text")
    assert "redundancy_passes_states" in stages.counters(store, context.job.id)


def test_trials_alone_are_asked_of_every_other_shard(store: Database, worker) -> None:
    sizes = {"calibration": 20, "search": 4, "held_out": 8, "unit": "samples"}
    redundancy.measured(in_process.context(store, worker, in_process.spec(splits=sizes)), ("trials",))
    assert [(request.shard, request.shards) for request in asked(worker)] == [(0, 3), (2, 3)]


def test_other_samples_or_settings_are_measured_anew(store: Database, worker, monkeypatch: pytest.MonkeyPatch) -> None:
    redundancy.measured(in_process.context(store, worker, in_process.spec()), ("distance",))
    asked(worker)
    sizes = {"calibration": 5, "search": 4, "held_out": 8, "unit": "samples"}
    redundancy.measured(in_process.context(store, worker, in_process.spec(splits=sizes)), ("distance",))
    assert asked(worker)
    monkeypatch.setattr(JobContext, "settings", "dtype=bfloat16 attention=eager device=cpu")
    redundancy.measured(in_process.context(store, worker, in_process.spec()), ("distance",))
    assert asked(worker)


def test_a_criterion_that_needs_no_measurement_asks_for_none(store: Database, worker) -> None:
    table = redundancy.run(in_process.context(store, worker, in_process.spec(criterion="early-exit")))
    assert asked(worker) == [] and table.rows == () and table.num_layers == 12


def test_a_search_hangs_on_nothing_that_other_jobs_measured(store: Database, worker) -> None:
    fields = {"criterion": "cosine", "search": {"latency_model": "layers"}, "actions": ["skip"]}
    problems = []
    for criterion in ("cosine", "skip-it", "cosine"):  # the second stores removals beside the distances
        context = in_process.context(store, worker, in_process.spec(**fields | {"criterion": criterion}))
        table = redundancy.run(context)
        problems.append(search._problem(context, profile.run(context), table))
        found = stages.get(store, context.job.id, STAGE)
        assert found is not None and found.payload["value"]["agreement"]["pairs"] == (
            12 if criterion == "skip-it" else 0
        )
    assert table.has("final_divergence", "answer")
    assert problems[0].risk == problems[2].risk and problems[0].seeds == problems[2].seeds


def test_a_search_that_goes_on_is_told_what_it_was_told_before(store: Database, worker) -> None:
    context = in_process.context(store, worker, in_process.spec(search={"latency_model": "layers"}, actions=["skip"]))
    table = redundancy.run(context)
    agreement = {"rho": 0.2, "low": -0.1, "high": 0.4, "pairs": 12, "verdict": ""}
    stages.record_stage(store, context.job, STAGE, {"value": {"criterion": "skip-it", "agreement": agreement}})
    assert search._problem(context, profile.run(context), table).trust == 0.2
    method = {"latency_model": "layers", "strategy": "skip-it"}
    other = in_process.context(store, worker, in_process.spec(search=method, actions=["skip"]))
    stages.record_stage(store, other.job, STAGE, {"value": {"criterion": "skip-it", "agreement": agreement}})
    assert search._problem(other, profile.run(other), table).trust == 1.0  # a method is tried as it is
