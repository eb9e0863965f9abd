"""What is shown of jobs that judge by several losses: each figure with the task that it is of, by its own limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from report_builders import LOSSES, SEVERAL, begun_joint_job, finished_job, joint_job, loss
from test_report_figures import Page, db

from optimizer import api
from optimizer.cli.screen import answer, figures, plans_table
from optimizer.job.result import load_result, tasks_of_job
from optimizer.reports import formatting
from optimizer.reports.compare import comparability, comparison_page
from optimizer.reports.data import Specification, collect
from optimizer.reports.evaluations import evaluations_frame, samples_frame
from optimizer.reports.figures import front
from optimizer.reports.heights import height
from optimizer.reports.html import search_curves, write_report
from storage.database import Database
from storage.queue import leases
from storage.records.plans import Plan

__all__ = ["db"]  # the fixture

COUNTS, SHAPES, TEXT = LOSSES
UNLIMITED = [each | {"max_loss": None, "min_accuracy": None} for each in (COUNTS, SHAPES)]


@pytest.fixture
def plan(db: Database) -> Plan:
    return load_result(db, joint_job(db)).plans[0]


@pytest.mark.parametrize(
    ("objective", "losses", "expected"),
    [
        ("worst", LOSSES, (-0.01, -0.012, 0.0)),  # shapes: all of its limit, counts two thirds, text half
        ("worst", [COUNTS, SHAPES | {"loss": 0.0}], (-0.02 / 3, -0.025 / 3, -0.01 / 3)),  # in units of 1 point
        ("worst", [COUNTS, SHAPES | {"max_loss": 0.0}], (-0.01, -0.012, 0.0)),  # ten times a limit of 0.1 points
        ("worst", [loss("a", 0.02, 0.01, 0.03, None, min_accuracy=0.915), SHAPES], (-0.04, -0.06, -0.02)),  # 0.5 points
        ("mean", LOSSES, (-0.0125, -0.01525, -0.0025)),
        ("worst", UNLIMITED, (-0.0125, -0.01525, -0.0025)),
    ],
)
def test_plans_are_drawn_at_what_the_search_minimised(
    plan: Plan, objective: Any, losses: list[dict[str, Any]], expected: tuple[float, float, float]
) -> None:
    found = height(replace(plan, secondary={"goals": losses}), objective)
    assert (found.value, found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "line", "told"),
    [
        ({}, 0.01, "largest share of its limit, scaled to the least limit of accuracy, 1 point"),
        ({"search": {"objective": "mean"}}, 0.015, "weighted mean of the losses"),  # (3 * 1 + 3) / 4 points
        ({"tasks": [{"task": "a"}, {"task": "b"}], "collateral": {}}, None, "weighted mean of the losses"),
        ({"tasks": [{"task": "a", "max_accuracy_drop": 0.0}, {"task": "b"}]}, 0.001, "largest share of its limit"),
        ({"tasks": [{"task": "a", "min_accuracy": 0.5}, {"task": "b"}], "collateral": {}}, 0.01, "largest share"),
    ],
)
def test_the_line_is_where_a_limit_is_reached(
    db: Database, changes: dict[str, Any], line: float | None, told: str
) -> None:
    report = collect(db, joint_job(db, **changes))
    chart = front(report)
    assert chart is not None
    drawn = [each["y0"] for each in chart.layout["shapes"]]
    assert drawn == ([] if line is None else [pytest.approx(-100 * line)])
    text = Page(write_report(db, report.job.id)).text
    assert told in text and ("dotted line" in text) is (line is not None)


@pytest.mark.parametrize("number", [0, 1])
def test_limits_are_the_tasks_own(db: Database, number: int) -> None:
    stored = [
        SEVERAL,
        SEVERAL | {"tasks": [{"task": "a", "max_accuracy_drop": None}, {"task": "/files/b.yaml"}], "collateral": {}},
    ][number]
    expected = [
        [
            "loss of accuracy on counts at most 3 points",
            "accuracy on counts at least 0.7",
            "loss of accuracy on shapes at most 1 point",
            "divergence on text at most 0.4 nats a token",
        ],
        ["none"],
    ][number]
    constraint = {"max_accuracy_drop": 0.05, "min_accuracy": 0.4}
    report = collect(db, joint_job(db, **(stored | {"constraint": constraint})))
    assert formatting.constraint(report) == expected


def test_figures_name_the_task_that_they_are_of(db: Database, plan: Plan) -> None:
    assert formatting.difference(plan).endswith(" on counts")  # it may have lost 2.5 points there, 1.2 on shapes
    assert formatting.accuracy(plan).endswith(" on counts")
    for text in (answer(plan), figures(plan)):
        assert "counts -2.00 points" in text and "shapes -1.00 points" in text and "text 0.200" in text
    table = plans_table((plan,), best=plan, title=None)
    assert str(next(iter(table.columns[3].cells))).endswith(" on counts")
    assert plan.job_id is not None
    report = collect(db, plan.job_id)
    assert formatting.short_answer(report).endswith(" on counts")
    shown = {row[0]: row[1] for row in comparison_page(db, report, report).sections[0].tables[0].rows}
    assert "shapes -1.00 points" in shown["all losses"] and shown["accuracy"].endswith(" on counts")


def test_only_jobs_that_judge_alike_are_compared(db: Database) -> None:
    report = collect(db, joint_job(db))
    like = joint_job(db, tasks=SEVERAL["tasks"][::-1])
    others = [
        joint_job(db, collateral={}),
        joint_job(db, tasks=[SEVERAL["tasks"][0], SEVERAL["tasks"][1] | {"min_accuracy": None}]),
        joint_job(db, search={"objective": "mean"}),
        finished_job(db),
    ]
    names = [name for name, _ in search_curves(db, report)[1:]]
    assert [name.split(" (")[0] for name in names] == [f"job {like}"]
    assert comparability(report, collect(db, like)) == "Same model, task and samples, same device."
    for other in others:
        assert comparability(report, collect(db, other)).startswith("These jobs differ")


def test_one_task_is_not_compared_with_several(db: Database) -> None:
    joint_job(db)
    first, second = finished_job(db), finished_job(db, constraint={"max_accuracy_drop": 0.2})
    names = [name for name, _ in search_curves(db, collect(db, second))[1:]]
    assert [name.split(" (")[0] for name in names] == [f"job {first}"]  # whatever its limits, as on one task


@pytest.mark.parametrize("end", ["running", "failed"])
def test_a_job_before_its_profile_is_of_all_its_tasks(db: Database, end: str) -> None:
    job, ids = begun_joint_job(db)
    if end == "failed":
        leases.fail(db, job, "the device is full")
    report = collect(db, job.id)
    assert report.task_name == "counts+shapes" and report.ids == (ids["model_id"], ids["task_id"])
    text = Page(write_report(db, job.id)).text
    assert "on counts+shapes" in text and "is known once the search has ended" in text


def test_hashes_of_all_tasks_are_told(db: Database) -> None:
    told = dict(Page(write_report(db, joint_job(db))).table("Versions, hashes and seeds"))
    for name in ("counts", "shapes", "text"):
        assert told[f"{name}, search split (SHA-256)"] == f"hash of {name}"


def test_rows_of_evaluations_name_their_task(db: Database) -> None:
    job = joint_job(db)
    expected = ["counts", "shapes", "text"]
    assert list(evaluations_frame(db, job).task) == expected
    assert list(samples_frame(db, job).task) == [name for name in expected for _ in range(40)]
    assert list(api.evaluations(job, database=str(db.engine.url)).task) == expected


def test_tasks_are_spelt_as_they_are_asked_for() -> None:
    assert tasks_of_job({"tasks": [{"task": "b"}, {"task": "a"}]}) == "a+b"
    assert tasks_of_job({"tasks": [{"task": "b"}, {"task": "/x/a.yaml"}]}) == "/x/a.yaml+b"
    assert Specification.of({"tasks": [{"task": "b"}, {"task": "/x/c.yaml"}]}).tasks == ("b", "c")
