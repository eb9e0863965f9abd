"""The Python API: light to import, and the same figures as the database's."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_builders import LAYERS, finished_job

import optimizer
from optimizer import best, engine_latencies, evaluations, export, plans, redundancy, report, run, submit
from optimizer.errors import NoFeasiblePlan, UsageFault
from optimizer.job.best import find_best
from storage.database import Database
from storage.errors import NotFound, UnreachableDatabase
from storage.queue import jobs
from storage.records.plans import PlanQuery

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    found = f"sqlite:///{tmp_path / 'api.db'}"
    monkeypatch.setenv("SKIPPLAN_DATABASE", found)
    with Database.open(found) as db:
        finished_job(db)
    return found


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, optimizer; from optimizer import plans, report; "
        "heavy = {'torch', 'ray', 'transformers', 'pandas', 'optuna', 'plotly', 'matplotlib', 'sqlalchemy'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_function_is_listed_and_documented() -> None:
    for name in optimizer.__all__:
        assert getattr(optimizer, name).__doc__
        assert name in dir(optimizer)
    with pytest.raises(AttributeError, match="no attribute 'plan'"):
        _ = optimizer.plan


def test_latency_in_an_engine(url: str) -> None:
    frame = engine_latencies(1)
    assert list(frame["speedup"]) == [1.082, 1.043] and list(frame["concurrency"]) == [1, 16]
    assert frame["plan_id"].nunique() == 1 and list(frame["dense_latency_seconds"]) == [0.1, 0.1]
    found = best("tiny-llava", "shapes", max_accuracy_drop=0.5, engine="vllm")
    assert found is not None and found.speedup == 1.131  # not the fastest by generate
    with pytest.raises(NotFound, match="no plan was served by vllm with a concurrency of 2"):
        best("tiny-llava", "shapes", max_accuracy_drop=0.5, engine="vllm", concurrency=2)
    # At 16 its interval reaches below 1: it may be slower than dense there.
    assert best("tiny-llava", "shapes", max_accuracy_drop=0.5, engine="vllm", concurrency=16) is None
    assert list(plans(engine="vllm", min_speedup=1.05)["speedup"]) == [1.131]
    with pytest.raises(NotFound, match="there is no job 7"):
        engine_latencies(7)


def test_plans_as_a_frame(url: str) -> None:
    frame = plans(model="tiny-llava", task="shapes")
    assert list(frame["speedup"]) == [1.871, 1.523, 1.131]
    assert list(frame["meets_constraint"]) == [False, True, True]
    assert frame.index.name == "id"
    assert len(plans(max_accuracy_drop=0.02, database=url)) == 2
    empty = plans(min_speedup=9.0)
    assert (len(empty), list(empty.columns)) == (0, list(frame.columns))
    with pytest.raises(NotFound, match="did you mean tiny-llava or models/tiny-llava"):
        plans(model="tiny-lava")


def test_best(url: str) -> None:
    found = best("tiny-llava", "shapes", max_accuracy_drop=0.02)
    assert found is not None
    assert (found.speedup, found.plan) == (1.523, "RRSSSRRR")
    assert best("tiny-llava", "shapes", min_speedup=5.0) is None


def test_best_without_a_limit_of_accuracy_leaves_out_what_its_job_refused(url: str) -> None:
    found = best("tiny-llava", "shapes")
    assert found is not None and found.speedup == 1.523
    assert best("tiny-llava", "shapes", min_speedup=1.6) is None
    loose = best("tiny-llava", "shapes", max_accuracy_drop=1.0, min_speedup=1.6)
    assert loose is not None and loose.speedup == 1.871
    with (
        Database.open(url) as db,
        pytest.raises(NoFeasiblePlan, match=r"its own job.*plan \d+, misses it"),
    ):
        find_best(db, PlanQuery("tiny-llava", "shapes", min_speedup=1.6))


def test_what_was_scored_and_measured(url: str) -> None:
    scored = evaluations(1)
    assert len(scored) == 14  # dense, twelve plans and the failure
    assert scored.iloc[0]["plan"] == "R" * LAYERS
    assert scored["failure"].dropna().to_list() == ["NaN in the logits"]
    measured = redundancy(1)
    assert len(measured) == 3 * LAYERS
    chosen = measured[(measured["token_group"] == "vision") & (measured["layer"] == 2)]
    assert chosen["value"].item() == pytest.approx(0.03)
    with pytest.raises(NotFound, match="there is no job 9"):
        evaluations(9)


def test_report_by_the_ending_of_its_name(url: str, tmp_path: Path) -> None:
    assert report(1, "page.html") == Path("page.html")
    assert "tiny-llava on shapes runs 1.52 times" in Path("page.html").read_text()
    assert report(1, tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageFault, match=r"page\.pdf: a report is written as \.html or \.png"):
        report(1, "page.pdf")


def test_export(url: str, tmp_path: Path) -> None:
    export(1, tmp_path / "out", format="plan")
    assert (tmp_path / "out" / "skipplan.json").is_file()
    with pytest.raises(UsageFault, match="did you mean checkpoint"):
        export(1, tmp_path / "other", format="chekpoint")


def test_submit_takes_a_file_or_its_fields(url: str, tmp_path: Path) -> None:
    fields = {
        "model": {"path": "llava-12"},
        "task": "scenes",
        "splits": {"calibration": 2, "search": 4, "held_out": 4, "unit": "images"},
    }
    queued = submit(fields)
    assert queued.state == "queued"
    (tmp_path / "job.yaml").write_text(
        "model: {path: llava-12}\ntask: scenes\nsplits: {calibration: 2, search: 4, held_out: 4, unit: images}\n"
    )
    assert submit(tmp_path / "job.yaml", database=url).id == queued.id  # the same specification, so the same job
    assert submit(fields, force=True).id != queued.id
    with Database.open(url) as db:
        assert jobs.count(db)["queued"] == 2
    with pytest.raises(UsageFault, match="job: tsk: unknown field; did you mean task"):
        submit({"model": {"path": "llava-12"}, "tsk": "scenes"})


def test_run_raises_what_is_wrong_as_the_command_says_it(url: str, tmp_path: Path) -> None:
    splits = {"calibration": 2, "search": 4, "held_out": 4, "unit": "images"}
    with pytest.raises(UsageFault, match="model tiny-lava: no such directory"):
        run({"model": {"path": "tiny-lava"}, "task": "scenes", "splits": splits})
    with pytest.raises(UsageFault, match="job: tsk: unknown field; did you mean task"):
        run({"model": {"path": "llava-12"}, "tsk": "scenes"})


def test_missing_database(tmp_path: Path) -> None:
    with pytest.raises(UnreachableDatabase):
        plans(database=f"sqlite:///{tmp_path / 'nowhere.db'}")


def test_the_documented_signatures_are_the_functions() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)\(([^)]*)\)`", page, flags=re.MULTILINE)
    assert sorted(name for name, _ in shown) == sorted(optimizer.__all__)
    for name, arguments in shown:
        takes = inspect.signature(getattr(optimizer, name)).parameters
        for argument in filter(lambda each: each.strip() != "...", arguments.split(",")):
            written, _, default = argument.strip().partition("=")
            assert written in takes, f"{name}({written})"
            if default:
                assert repr(takes[written].default) == default.replace('"', "'"), f"{name}({argument})"
