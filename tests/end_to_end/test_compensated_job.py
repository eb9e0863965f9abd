"""A whole job with compensated skips: maps kept and named, folded models as published, maps fitted again bit by bit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import PROJECT, FinishedJob, command

from storage.database import Database
from storage.records import evaluations, plans

pytestmark = pytest.mark.slow

BENCHMARKS = PROJECT / "tests" / "benchmarks"
JOB = """\
model: {path: llava-12}
task: easy-vqa
criterion: block-influence
compensation: {kind: linear, tokens: 2048}
collateral: {tasks: [scenes], text: general.txt, samples: 8}
constraint: {max_accuracy_drop: 1.0}
search: {trials: 6, batch: 6, finalists: 2, rungs: [16]}
splits: {calibration: 60, search: 32, held_out: 60, unit: samples}
guard: {false_alarms: 0.5}
workload: {new_tokens: 2}
latency: {precision: 0.1, max_seconds: 4}
cluster: {workers: 1}
"""
TEXT = "What shape is in the image? There is a red circle. " * 20


@pytest.fixture(scope="module")
def compensated_job(tmp_path_factory: pytest.TempPathFactory) -> FinishedJob:
    directory = tmp_path_factory.mktemp("compensated")
    (directory / "job.yaml").write_text(JOB)
    (directory / "general.txt").write_text(TEXT)
    ended = command(directory, "run", "job.yaml", "--json", timeout=1800)
    assert ended.code == 0, ended.errors
    return FinishedJob(directory, directory / "job.yaml", json.loads(ended.output))


def recipe(plan: dict[str, Any]) -> str:
    return str(plan["compensation"])


def test_every_published_plan_names_its_maps(compensated_job: FinishedJob) -> None:
    assert compensated_job.result["plans"]
    for plan in compensated_job.result["plans"]:
        assert recipe(plan) == "linear ridge=0.001 weighting=answers tokens=2048 text_share=0.1"
        content = Path(plan["artifact"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == plan["artifact_checksum"]
        assert Path(plan["artifact"]).parent == compensated_job.directory / "skipplan-artifacts"
        gaps = plan["secondary"]["compensation"]["gaps"]
        assert 0 < plan["secondary"]["compensation"]["text_tokens"] <= 0.1 * 2048 + 1
        assert gaps and all(gap["unexplained"] <= gap["plain_share"] for gap in gaps)
    with Database.open(compensated_job.database_url, create=False) as db:
        held_out = evaluations.for_job(db, compensated_job.result["job"], "held_out")
        by_plan = {plan.plan: plan for plan in plans.for_job(db, compensated_job.result["job"])}
    for each in held_out:
        if each.plan in by_plan:
            assert each.artifact_checksum == by_plan[each.plan].artifact_checksum
            assert by_plan[each.plan].accuracy == pytest.approx(each.accuracy)


def test_collateral_stands_with_the_plan_and_limits_best(compensated_job: FinishedJob) -> None:
    asked = ("best", "--model", "llava-12", "--task", "easy-vqa", "--json")
    for plan in compensated_job.result["plans"]:
        beside = plan["secondary"]["collateral"]
        assert (
            beside["tasks"]["scenes"]["n_samples"] == 8 and beside["text"]["tokens"] > 100 and beside["text"]["kl"] > 0
        )
    loosest = max(p["secondary"]["collateral"]["text"]["kl"] for p in compensated_job.result["plans"])
    assert command(compensated_job.directory, *asked, "--max-text-kl", str(loosest)).code == 0
    refused = command(compensated_job.directory, *asked, "--max-text-kl", "0")
    assert refused.code == 3 and "the dense model is the answer" in refused.errors


def test_an_outsider_measures_the_published_accuracy(compensated_job: FinishedJob, tmp_path: Path) -> None:
    best = compensated_job.best
    directory = compensated_job.directory
    assert command(directory, "export", str(best["id"]), "--output", "folded").code == 0
    verified = command(directory, "verify-export", "folded", "--samples", "2")
    assert verified.code == 0, verified.output + verified.errors
    samples = tmp_path / "held_out"
    script = [sys.executable, BENCHMARKS / "held_out_samples.py", compensated_job.job_file, samples]
    subprocess.run(script, cwd=PROJECT, env={"PYTHONPATH": str(PROJECT)}, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-I", BENCHMARKS / "exported_accuracy.py", directory / "folded", samples / "samples.jsonl"],
        cwd=samples,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(best["accuracy"], abs=1.5 / best["n_samples"])


def test_a_lost_artifact_is_fitted_again_bit_by_bit(compensated_job: FinishedJob) -> None:
    best, directory = compensated_job.best, compensated_job.directory
    kept = Path(best["artifact"]).read_bytes()
    Path(best["artifact"]).unlink()
    refused = command(directory, "export", str(best["id"]), "--output", "lost")
    assert refused.code == 2 and "skipplan refit" in refused.errors
    again = command(directory, "refit", str(best["id"]), "--json")
    assert again.code == 0, again.errors
    assert json.loads(again.output)["same"] and Path(best["artifact"]).read_bytes() == kept
