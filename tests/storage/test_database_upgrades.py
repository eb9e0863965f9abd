"""Databases that earlier versions wrote, brought to today's schema and read by today's functions.

The dumps are of a quickstart job (shortened) and of a job that failed after some evaluations, written by the code of
their revision on both engines.
"""

import sqlite3
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text

from optimizer.job.loading import read_spec
from optimizer.job.result import load_result
from optimizer.reports.data import collect
from storage import migration
from storage.database import Database
from storage.queue import events, jobs, stages
from storage.records import evaluations, lookup, measurements, plans
from storage.records.plans import PlanQuery

FOLDER = Path(__file__).parents[1] / "fixtures" / "databases"


@pytest.fixture(params=["0001", "0002"])
def revision(request):
    return request.param


@pytest.fixture
def old_url(empty_database_url, revision):
    """The URL of a database as the code of that revision left it."""
    if "postgresql" in empty_database_url:
        dump = (FOLDER / f"postgresql_{revision}.sql").read_text(encoding="utf-8")
        url = make_url(empty_database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:
            connection.execute(dump)
    else:
        dump = (FOLDER / f"sqlite_{revision}.sql").read_text(encoding="utf-8")
        with sqlite3.connect(empty_database_url.removeprefix("sqlite:///")) as connection:
            connection.executescript(dump)
    return empty_database_url


@pytest.fixture
def upgraded(old_url):
    with Database.open(old_url, migrate=True) as db:
        yield db


def test_upgraded_database_is_as_this_version_writes_it(upgraded):
    assert migration.check(upgraded.engine) == []


def test_jobs_are_read(upgraded):
    succeeded, failed = jobs.get(upgraded, 1), jobs.get(upgraded, 2)
    assert (succeeded.state, failed.state, failed.error) == ("succeeded", "failed", "its cluster was lost")
    spec = read_spec(failed)
    assert (spec.redundancy_samples, spec.artifacts, spec.search.seed) == (48, "skipplan-artefacts", 1)
    assert (spec.latency.precision, spec.latency.max_seconds) == (0.02, 12.0)
    assert (spec.search.trials, spec.search.latency_model) == (48, "profile")
    assert read_spec(succeeded).model.path == "llava-12"
    assert [each.kind for each in events.for_job(upgraded, 1)].count("stage_finished") == 9


def test_finished_job_keeps_its_stages_and_an_unfinished_one_begins_them_anew(upgraded):
    assert {"profile", "search", "verify", "publish"} <= set(stages.stages(upgraded, 1))
    assert stages.stages(upgraded, 2) == {}
    assert jobs.resume(upgraded, 2).state == "queued"


def test_evaluations_keep_their_scores(upgraded, revision):
    found = evaluations.for_job(upgraded, 1)
    assert {each.split: each.n_samples for each in found} == {"search": 256, "held_out": 1500}
    assert all(len(each.scores) == each.n_samples for each in found)
    dense = next(each for each in found if each.plan == "R" * 12 and each.split == "search")
    assert dense.accuracy == 1.0
    by_plan = {(each.plan, each.n_samples): each for each in evaluations.for_job(upgraded, 2)}
    assert by_plan["SSSSSSSSSSSS", 64].failure == "NaN in the logits"
    compensated = by_plan["RRRRRRSSSSSS", 2]
    assert compensated.scores == (1.0, 0.0)
    assert by_plan["RRRRRRSSSSSS", 4].scores == (1.0, 0.0, 0.5, 1.0), "numbers of rungs are numbers of samples"
    assert by_plan["RRRRRSSSSSSS", 4].scores == (1.0, 1.0, 0.0, 0.0)
    if revision != "0001":  # which did not keep them
        assert (compensated.kl, compensated.artifact_checksum) == ((0.5, 0.25), "ab" * 32)
    reused = next(each for each in by_plan.values() if each.reused_from is not None)
    assert reused.scores == next(each for each in found if each.id == reused.reused_from).scores


def test_evaluations_are_found_by_later_jobs(upgraded):
    dense = next(each for each in evaluations.for_job(upgraded, 1, "search") if each.plan == "R" * 12)
    known = evaluations.known(
        upgraded, model_id=dense.model_id, task_id=dense.task_id, split_hash=dense.split_hash, settings=dense.settings
    )
    assert dense.id in {each.id for each in known}


def test_plans_keep_their_figures(upgraded, revision):
    best = plans.best(upgraded, PlanQuery("llava-12", "easy-vqa", max_accuracy_drop=0.01))
    assert best == plans.get(upgraded, 2)
    assert (best.plan, best.n_samples, best.accuracy) == ("RRRSRSSSSSSS", 1500, 0.9966666666666667)
    assert (best.difference, best.difference_low, best.difference_high) == pytest.approx(
        (-0.0033333, -0.0074375, 0), abs=1e-6
    )
    assert (best.dense_latency_seconds, best.latency_seconds) == (0.07086551150001696, 0.03326333250001312)
    assert (best.speedup, best.dense_kv_cache_bytes, best.kv_cache_bytes) == (2.1140080311247935, 737280, 245760)
    assert len(plans.list_plans(upgraded, PlanQuery(sort="latency_seconds"))) == 5
    (compensated,) = plans.for_job(upgraded, 2)
    assert compensated.compensation == "linear ridge=0.001"
    gaps = compensated.secondary["compensation"]["gaps"]
    assert gaps == [{"layer": 6, "end": 12, "plain_share": 0.8, "unexplained": 0.25}]
    assert compensated.artifact == (None if revision == "0001" else "skipplan-artefacts/ab.safetensors")


def test_models_tasks_and_measurements_are_read(upgraded):
    assert (lookup.model(upgraded, 1).name, lookup.model(upgraded, 1).num_layers) == ("llava-12", 12)
    assert (lookup.task(upgraded, 1).name, len(lookup.task(upgraded, 1).task_hash)) == ("easy-vqa", 64)
    profile = measurements.profile_of_job(upgraded, 1)
    assert profile.dense_latency_seconds == pytest.approx(0.0520213)
    assert len(profile.layer_seconds["R"]) == 12
    assert measurements.redundancy_of_job(upgraded, 1, 1, 1)


def test_result_and_report_are_read(upgraded):
    result = load_result(upgraded, 1)
    assert result.best is not None and result.best.id == 2
    assert result.search == {
        "plans_tried": 5,
        "plans_failed": 0,
        "stopped_because": "the budget of 48 evaluations is spent",
    }
    report = collect(upgraded, 1)
    assert report.search_samples == 256
    assert len(report.plans) == 4
    assert report.model_name == "llava-12"


def test_two_rows_that_are_one_today_leave_the_scores(old_url):
    """A failure with the number of a rung, and scores of as many samples."""
    with Database.open(old_url, check_schema=False) as db, db.transaction() as session:
        session.execute(text("UPDATE evaluations SET rung = 4, plan = 'RRRRRSSSSSSS' WHERE failure IS NOT NULL"))
    with Database.open(old_url, migrate=True) as db:
        found = [each for each in evaluations.for_job(db, 2) if each.plan == "RRRRRSSSSSSS"]
    assert [(each.n_samples, each.failure) for each in found] == [(4, None)]
