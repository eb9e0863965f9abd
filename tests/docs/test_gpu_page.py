"""``make gpu`` without a GPU: its pieces run on small shapes, results are kept, and the page is what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT / "tests/benchmarks")
        import gpu

        return gpu


def test_the_page_is_what_the_results_so_far_give(gpu: ModuleType) -> None:
    kept = PROJECT / "docs/benchmarks-gpu.md"
    if "nothing has been measured" in kept.read_text():
        assert kept.read_text() == gpu.page({"machine": "", "pieces": {}})
    for name in gpu.pieces():
        assert f"| `{name}` |" in kept.read_text()


def test_pieces_are_kept_and_only_missing_ones_are_run(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    ends = {"check placement": "failed", "check timings": "stopped"}

    def run(name: str, options: object) -> dict[str, object]:
        ran.append(name)
        return {"state": ends.get(name, "done"), "seconds": 1.0, "date": "", "figures": {"ratio": 2.0}}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "machine", lambda: "a machine")
    results, page = tmp_path / "gpu.json", tmp_path / "page.md"
    arguments = ["--dry-run", "--results", str(results), "--page", str(page), "--directory", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert ran == [*gpu.pieces()]
    ran.clear()
    ends.clear()
    assert gpu.main(arguments) == 0
    assert ran == ["check placement", "check timings"]
    assert {each["state"] for each in json.loads(results.read_text())["pieces"].values()} == {"done"}
    assert "a machine, dry run" in page.read_text() and "ratio 2" in page.read_text()


def test_a_piece_that_takes_too_long_is_stopped_and_one_that_fails_gives_its_reason(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "piece.py"
    script.write_text("import sys, time; time.sleep(60) if 'long' in sys.argv else sys.exit('no such model')")
    monkeypatch.setattr(gpu, "SCRIPT", script)
    options = type("Options", (), {"dry_run": True, "directory": tmp_path, "seconds": 2.0})()
    found = {name: gpu.run(name, options) for name in ("long", "short")}
    assert (found["long"]["state"], found["long"]["reason"]) == ("stopped", "not done within 2 s")
    assert (found["short"]["state"], found["short"]["reason"]) == ("failed", "no such model")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "tests/benchmarks/gpu.py"), "--results", str(tmp_path / "gpu.json")]
    path = ":".join(str(PROJECT / each) for each in (".", "tests/helpers", "tests/benchmarks"))
    environment = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1 and "torch sees no GPU here" in done.stderr


@pytest.mark.slow
def test_every_piece_runs_on_small_shapes(gpu: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    arguments = ["--dry-run", "--results", str(results), "--directory", str(tmp_path / "gpu")]
    code = gpu.main(arguments)
    found = json.loads(results.read_text())["pieces"]
    assert {name: each.get("reason") for name, each in found.items() if each["state"] == "failed"} == {}
    assert code == 0 and {each["state"] for each in found.values()} <= {"done", "absent"}
