"""``skipplan report``: pages, pictures and comparisons, and what it says when it cannot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from report_builders import finished_job

from optimizer.cli.main import _run
from storage.database import Database


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    url = f"sqlite:///{tmp_path / 'report.db'}"
    monkeypatch.setenv("SKIPPLAN_DATABASE", url)
    monkeypatch.chdir(tmp_path)
    return Database.open(url)


def test_page_of_the_latest_job(database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_job(database)
    latest = finished_job(database, search={"strategy": "random", "seed": 1})
    assert _run(["report", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["jobs"], written["output"]) == ([latest], f"report-{latest}.html")
    page = (tmp_path / written["output"]).read_text()
    assert len(page.encode()) == written["bytes"]
    assert "this job (random, seed 1)" in page
    assert "job 1 (tpe, seed 7)" in page  # drawn beside it: same model, task and samples


def test_latency_in_engines_stands_in_page_and_tables(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = finished_job(database)
    assert _run(["report", str(job)]) == 0
    page = (tmp_path / f"report-{job}.html").read_text()
    assert "Latency in engines (2)" in page
    for cell in ("vllm 0.32.0, float32", "1.08 [1.03, 1.14]", "92.4 ms (dense 100.0 ms)", "2,048 (dense 1,024)"):
        assert cell in page, cell
    capsys.readouterr()
    best = ["best", "--model", "tiny-llava", "--task", "shapes", "--max-accuracy-drop", "0.5", "--engine", "vllm"]
    assert _run(best) == 0
    assert "vllm 0.32.0, 16 at once: 1.04" in " ".join(capsys.readouterr().out.split())
    assert _run([*best, "--json"]) == 0
    assert [each["speedup"] for each in json.loads(capsys.readouterr().out)["engine_latencies"]] == [1.082, 1.043]
    assert _run([*best, "--concurrency", "16"]) == 3  # its interval reaches below 1
    assert _run([*best, "--concurrency", "2"]) == 2
    assert _run([*best[:7], "--concurrency", "2"]) == 2
    assert "concurrency is that of an engine; name the engine too" in capsys.readouterr().err


def test_pictures(database: Database, tmp_path: Path) -> None:
    finished_job(database)
    for name in ("front", "plans", "redundancy", "theory", "progress", "latency"):
        assert _run(["report", "1", "--format", "png", "--figure", name, "--output", f"{name}.png"]) == 0
        picture = Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes())).convert("L")
        assert picture.width == 1600
        assert len(set(picture.resize((160, 90)).get_flattened_data())) > 10  # something is drawn


def test_comparison(database: Database, tmp_path: Path) -> None:
    finished_job(database)
    finished_job(database, search={"strategy": "random", "seed": 1})
    assert _run(["report", "--compare", "1", "2", "--output", "both.html"]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "Same model, task and samples, same device." in page
    assert "job 2 (random, seed 1)" in page


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["report", "5"], 2, "there is no job 5"),
        (["report", "1", "--output", "taken.html"], 2, "taken.html: exists already; --force replaces it"),
        (["report", "1", "--output", "."], 2, "is a directory; --output names a file"),
        (["report", "1", "--compare", "1", "2"], 2, "leave JOB and --format png out"),
        (["report", "1", "--format", "pdf"], 2, "'html', 'png'"),
    ],
)
def test_what_cannot_be_written(
    database: Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    finished_job(database)
    (tmp_path / "taken.html").write_text("mine")
    assert _run(arguments) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_empty_database(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["report"]) == 2
    assert "there is no job in the database yet; run one with: skipplan run CONFIG" in capsys.readouterr().err


def test_nothing_to_draw(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    from report_builders import queued

    queued(database)
    assert _run(["report", "1", "--format", "png"]) == 2
    assert "front was not measured" in capsys.readouterr().err
