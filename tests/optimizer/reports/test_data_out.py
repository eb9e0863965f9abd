"""``skipplan evaluations`` and ``compare``: what is written is what the database holds."""

from __future__ import annotations

import csv
import json
import math
import sqlite3
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from report_builders import LAYERS, claimed, finished_job, identities, record_scores, scores_with, skipping

from optimizer.cli.main import _run
from storage.database import Database


@pytest.fixture
def database(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("SKIPPLAN_DATABASE", sqlite_url)
    monkeypatch.chdir(tmp_path)
    return Database.open(sqlite_url)


def test_every_evaluation_is_a_row(database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = finished_job(database)
    finished_job(database)  # whose rows must not be among them
    assert _run(["evaluations", str(job), "--output", "all.csv", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with sqlite3.connect(tmp_path / "skipplan.db") as plain:
        plain.row_factory = sqlite3.Row
        stored = plain.execute("SELECT * FROM evaluations WHERE job_id = ? ORDER BY id", (job,)).fetchall()
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert told == {"job": job, "rows": len(stored), "output": "all.csv"}
    assert len(rows) == len(stored) == 14  # dense, twelve tried, one that failed
    for row, kept in zip(rows, stored, strict=True):
        for name in ("id", "plan", "compensation", "split", "n_samples", "settings", "layer_executions"):
            assert row[name] == str(kept[name])
        assert row["failure"] == (kept["failure"] or "")
        assert row["accuracy"] == ("" if kept["accuracy"] is None else str(kept["accuracy"]))
    assert [row["failure"] for row in rows if row["failure"]] == ["NaN in the logits"]


def test_every_sample_is_a_row_in_parquet(database: Database, tmp_path: Path) -> None:
    job = claimed(database)
    ids = identities(database)
    scores = {"R" * LAYERS: [0.25, 1.0, math.nan], skipping(3): [1.0, 0.0, 1.0, 1.0]}
    for plan, values in scores.items():
        record_scores(database, job, ids, plan, values)
    assert _run(["evaluations", str(job.id), "--samples", "--output", "samples.parquet"]) == 0
    columns = pyarrow.parquet.read_table(tmp_path / "samples.parquet").to_pydict()
    assert columns["plan"] == ["R" * LAYERS] * 3 + [skipping(3)] * 4
    assert columns["sample"] == [0, 1, 2, 0, 1, 2, 3]
    assert columns["score"] == [0.25, 1.0, None, 1.0, 0.0, 1.0, 1.0]
    assert len(set(columns["evaluation"])) == 2


def test_means_and_lists_agree_between_the_formats(database: Database, tmp_path: Path) -> None:
    job = finished_job(database)
    for name in ("all.csv", "all.parquet"):
        assert _run(["evaluations", str(job), "--output", name]) == 0
    written = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pydict()
    accuracies = dict(zip(written["plan"], written["accuracy"], strict=True))
    assert accuracies["R" * LAYERS] == sum(scores_with(2)) / 40
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [float(row["accuracy"]) if row["accuracy"] else None for row in rows] == written["accuracy"]


def test_a_job_without_evaluations_is_an_empty_table(database: Database, tmp_path: Path) -> None:
    job = claimed(database)
    for options in ([], ["--samples"]):
        assert _run(["evaluations", str(job.id), "--output", "none.csv", "--force", *options]) == 0
        assert len((tmp_path / "none.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluations", "1", "--output", "all.xlsx"], "all.xlsx: a table is written as .csv or .parquet"),
        (["evaluations", "1", "--output", "taken.csv"], "taken.csv: exists already; --force replaces it"),
        (["evaluations", "5", "--output", "all.csv"], "there is no job 5"),
        (["compare", "1", "5"], "there is no job 5"),
    ],
)
def test_refusals_of_data_out(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    finished_job(database)
    (tmp_path / "taken.csv").write_text("mine")
    assert _run(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert (tmp_path / "taken.csv").read_text() == "mine"


def test_parquet_says_what_it_needs(
    database: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_job(database)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert _run(["evaluations", "1", "--output", "all.parquet"]) == 2
    assert "pip install 'skipplan[parquet]'" in capsys.readouterr().err


def test_two_jobs_side_by_side(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    finished_job(database)
    finished_job(database, search={"strategy": "random", "seed": 1})
    assert _run(["compare", "1", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Same model, task and samples, same device." in shown
    (line,) = (line for line in shown.splitlines() if line.lstrip("│ ").startswith("search"))
    assert "tpe" in line and "random" in line
    assert _run(["compare", "1", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(each["job"], each["search"], each["state"]) for each in told["jobs"]] == [
        (1, "tpe, seed 7", "succeeded"),
        (2, "random, seed 1", "succeeded"),
    ]
    assert told["jobs"][0]["speed-up, measured"].startswith("1.52")
