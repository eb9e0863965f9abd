"""The report of jobs that are not as usual: every figure is still the database's, and every form can be written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import storage_builders
from report_builders import (
    LAYERS,
    SAMPLES,
    SETTINGS,
    WORKLOAD,
    claimed,
    figures,
    finished_job,
    identities,
    record_profile,
    record_redundancy,
    record_scores,
    scores_with,
)
from test_report_figures import Page, db, rows

from optimizer.reports import formatting, sections
from optimizer.reports.compare import write_comparison
from optimizer.reports.data import collect
from optimizer.reports.html import write_report
from optimizer.reports.picture import write_picture
from storage.database import Database
from storage.pareto import Group
from storage.queue import leases, stages
from storage.records import lookup, plans

__all__ = ["db"]  # the fixture

MIXED = "RFBSRFBS"
GAPS = "RRSSRRRR"
MAPS = "linear ridge=1"


@pytest.fixture
def odd_job(db: Database) -> int:
    """Infeasible: four actions, one skip twice (plain and compensated), every other plan failed or given up."""
    job = claimed(db)
    ids = identities(db)
    record_profile(db, job, ids)
    record_redundancy(db, job, ids)
    record_scores(db, job, ids, "R" * LAYERS, scores_with(1))
    record_scores(db, job, ids, MIXED, scores_with(SAMPLES))  # every answer lost
    record_scores(db, job, ids, GAPS, scores_with(1))
    record_scores(db, job, ids, GAPS, scores_with(0), compensation=MAPS)  # better than dense
    for plan in ("S" * LAYERS, "BBBBBBBB"):
        storage_builders.record_failure(
            db, job, **ids, plan=plan, split="search", split_hash="hash of search", n_samples=10,
            reason="<NaN> & so on",
            settings=SETTINGS,
        )  # fmt: skip
    plans.publish(
        db, job, Group(**ids, device_id=lookup.ensure_device(db, "test device"), workload=WORKLOAD),
        figures=[
            figures(MIXED, accuracy=0.031, speedup=1.7, meets=False),
            figures(GAPS, accuracy=0.940, speedup=0.93, meets=False),  # slower than dense
            figures(GAPS, accuracy=0.961, speedup=0.92, meets=False, compensation=MAPS, dense_kv_cache_bytes=0),
        ],
    )  # fmt: skip
    stages.record_stage(db, job, "publish", {"value": {"plan_ids": [], "best": None, "reason": "none is fast"}})
    leases.infeasible(db, job, "no plan meets the constraint: none is fast")
    return job.id


def test_figures_of_an_odd_job_are_the_database_s(db: Database, odd_job: int) -> None:
    written = write_report(db, odd_job)
    page = Page(written)
    stored = rows(db, "SELECT * FROM plans ORDER BY speedup DESC")
    table = page.table("Verified plans")[1:]
    assert [cells[0] for cells in table] == [str(row.id) for row in stored]
    for cells, row in zip(table, stored, strict=True):
        assert f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]" in cells
        assert f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]" in cells
    trace = page.trace("front", "verified, outside the limits")
    for place, key in (("x", "speedup"), ("y", "difference")):
        factor = 100 if key == "difference" else 1
        assert sorted(trace[place]) == pytest.approx(sorted(factor * getattr(row, key) for row in stored))
    assert page.strips[:3] == [row.plan for row in stored]
    assert "No plan met the constraint" in page.text
    assert "0 of them within the limits" in page.text
    assert "5 plans tried" in page.text
    assert "2 could not be scored" in page.text
    assert "<NaN>" not in written
    assert page.text.count(MAPS) >= 1


@pytest.mark.parametrize("figure", ["front", "plans", "redundancy", "theory", "progress", "latency"])
def test_every_picture_of_an_odd_job_can_be_drawn(db: Database, odd_job: int, figure: str) -> None:
    assert write_picture(db, odd_job, figure).startswith(b"\x89PNG")


def test_an_odd_job_beside_a_usual_one_and_an_empty_one(db: Database, odd_job: int, tmp_path: Path) -> None:
    usual, empty = finished_job(db), claimed(db).id
    for first, second in ((odd_job, usual), (usual, odd_job), (odd_job, empty), (empty, odd_job)):
        text = Page(write_comparison(db, first, second)).text
        assert f"job {first}" in text.lower()
        assert f"job {second}" in text.lower()


def test_another_job_with_actions_that_this_one_did_not_time(db: Database, odd_job: int) -> None:
    page = Page(write_report(db, finished_job(db)))  # its curves stand beside the odd job's, by its own profile
    assert [trace["name"] for trace in page.charts["progress"]["traces"]] == [
        "this job (tpe, seed 7)",
        f"job {odd_job} (tpe, seed 7)",
    ]


def test_guards_and_mixtures_are_shown(db: Database, odd_job: int, tmp_path: Path) -> None:
    share = {"prompts": 200, "sent": 0.985, "low": 0.957, "high": 0.995}
    own = {"prompts": 300, "sent": 0.01, "low": 0.003, "high": 0.029}
    guard = {"checksum": "ab", "layer": 1, "false_alarms": 0.01, "held_out": own, "tasks": {"scenes": share}}
    guard |= {"text": share, "net_speedup": 1.625}
    report = collect(db, odd_job)
    guarded, *others = report.plans
    mixture = {"tokens": 4096, "text_tokens": 410}
    guarded = replace(guarded, secondary={**guarded.secondary, "guard": guard, "compensation": mixture})
    others = [replace(each, secondary={**each.secondary, "guard": {"note": "it needs 99 images"}}) for each in others]
    result = replace(report.result, plans=(guarded, *others))
    section = sections.front(replace(report, result=result))
    (table,) = (each for each in section.tables if each.title == "Guards (1)")
    elsewhere = "scenes 98.5 % [95.7, 99.5] of 200; text 98.5 % [95.7, 99.5] of 200"
    assert table.rows == ((str(guarded.id), "1", "1 %", "1.0 % [0.3, 2.9] of 300", elsewhere, "1.62"),)
    assert "The plans have no guard: it needs 99 images." in section.paragraphs
    assert "fitted on 4,096 tokens, of them 410 of general text sampled" in formatting._compensation(guarded)
