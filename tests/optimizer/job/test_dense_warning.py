"""Whoever reads of a plan of a dense model that is not above chance reads that, whatever the output."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import report_builders
from fastapi.testclient import TestClient

from optimizer.cli.main import _run
from optimizer.cli.screen import Screen
from optimizer.dashboard.app import create_app
from optimizer.exports.card import model_card
from optimizer.exports.document import Export, describe
from optimizer.exports.interface import Guide
from optimizer.job.result import load_result
from optimizer.registries import EXPORT_FORMATS
from storage.database import Database
from storage.records import lookup, plans

WARNING = "the dense model is not above chance: accuracy 0.400 on 40 search samples"
BEST = ["best", "--model", "models/tiny-llava", "--task", "shapes"]


@pytest.fixture(params=[WARNING, ""], ids=["useless", "good"])
def warning(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The warning of the one job in the database, and none for the same job of a good model."""
    url = f"sqlite:///{tmp_path / 'skipplan.db'}"
    monkeypatch.setenv("SKIPPLAN_DATABASE", url)
    monkeypatch.chdir(tmp_path)
    with Database.open(url) as db:
        report_builders.finished_job(db, dense_warning=request.param)
    return str(request.param)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> str:
        assert _run(list(arguments)) == 0
        found = capsys.readouterr()
        return " ".join((found.out + found.err).split())

    return run


@pytest.mark.parametrize("arguments", [BEST, [*BEST, "--json"], ["plans", "--json"]])
def test_commands(warning: str, printed, arguments: list[str]) -> None:
    assert (WARNING in printed(*arguments)) == bool(warning)


def test_the_table_of_plans(warning: str, printed) -> None:
    assert ("but see the" in printed("plans")) == bool(warning)  # where the cell wraps depends on the others


def test_the_end_of_a_job(warning: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as db:
        result = load_result(db, 1)
    assert json.loads(json.dumps(result.to_json(), default=str))["warning"] == warning
    Screen(quiet=True).result(result)
    assert (f"Warning: {WARNING}" in " ".join(capsys.readouterr().out.split())) == bool(warning)


def test_reports(warning: str, printed, tmp_path: Path) -> None:
    printed("report", "1", "--output", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (f"Warning: {WARNING}" in page) == bool(warning)
    assert ("see the warning" in page) == bool(warning)


def test_the_dashboard(warning: str, tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as db:
        page = TestClient(create_app(db)).get("/jobs/1").text
    assert (WARNING in page) == bool(warning)


def test_the_card_of_an_export(warning: str, tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as db:
        plan = plans.get(db, 1)
        document = describe(plan, lookup.model(db, plan.model_id), lookup.task(db, plan.task_id))
    export = Export(
        format="runtime",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        model_fingerprint="ab" * 32,
        versions={},
        files={},
    )
    card = model_card(document.model_copy(update={"export": export}), EXPORT_FORMATS["runtime"], Guide("", ()))
    assert (WARNING in card) == bool(warning)
