"""The main job through the command line: what it prints is what is stored, and what an outsider measures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import MODEL, PROJECT, Ended, FinishedJob
from PIL import Image

from storage.database import Database
from storage.queue import jobs, stages
from storage.records import evaluations, plans
from workers.messages import ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan, apply

BENCHMARKS = PROJECT / "tests" / "benchmarks"


@pytest.fixture(scope="module")
def held_out(finished_job: FinishedJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job's held-out samples as plain files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from held_out_samples import write_samples

        return write_samples(finished_job.job_file, tmp_path_factory.mktemp("held_out"))


def outsider(checkpoint: Path, samples: Path, *more: str | Path) -> dict[str, float]:
    """Accuracy by a script that knows transformers only; ``-I`` keeps this project off its path."""
    script = BENCHMARKS / "exported_accuracy.py"
    done = subprocess.run(
        [sys.executable, "-I", script, checkpoint, samples, *more],
        cwd=samples.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def test_what_is_printed_is_what_is_stored(finished_job: FinishedJob):
    with Database.open(finished_job.database_url, create=False) as db:
        stored = plans.for_job(db, finished_job.result["job"])
        job = jobs.get(db, finished_job.result["job"])
        assert job.state == finished_job.result["state"] == "succeeded"
        assert [plan.id for plan in stored] == [plan["id"] for plan in finished_job.result["plans"]]
        best = next(plan for plan in stored if plan.id == finished_job.best["id"])
        for name in ("plan", "n_samples", "accuracy", "difference_low", "speedup", "speedup_low", "kv_cache_bytes"):
            assert getattr(best, name) == finished_job.best[name]


def test_published_figures_come_from_the_held_out_split_alone(finished_job: FinishedJob):
    with Database.open(finished_job.database_url, create=False) as db:
        every = evaluations.for_job(db, finished_job.result["job"])
    held_out = {each.plan: each for each in every if each.split == "held_out"}
    dense = held_out["R" * 12]
    for plan in finished_job.result["plans"]:
        assert plan["n_samples"] == 96 == len(held_out[plan["plan"]].scores)
        assert plan["accuracy"] == pytest.approx(sum(held_out[plan["plan"]].scores) / 96)
        assert plan["dense_accuracy"] == pytest.approx(sum(dense.scores) / 96)
        assert plan["difference_low"] <= plan["difference"] <= plan["difference_high"]
        assert plan["speedup_low"] <= plan["speedup"] <= plan["speedup_high"]
    assert {each.n_samples for each in every if each.split == "search"} <= {16, 48}
    keys = [(each.plan, each.split, each.n_samples) for each in every]
    assert len(keys) == len(set(keys))  # nothing twice


def test_every_stage_is_on_record_and_the_profile_speaks_of_all_layers(finished_job: FinishedJob):
    with Database.open(finished_job.database_url, create=False) as db:
        recorded = stages.stages(db, finished_job.result["job"])
    assert [name for name in recorded if not name.startswith("measure")] == [
        "inputs",
        "profile",
        "dense",
        "evidence",
        "warm start",
        "search",
        "verify",
        "guard",
        "publish",
    ]
    profile = recorded["profile"].payload["value"]
    assert all(len(profile[phase][letter]) == 12 for phase in ("prefill_seconds", "decode_seconds") for letter in "RS")
    assert recorded["search"].payload["value"]["trials"][0]["plan"] == "R" * 12


def test_dense_model_answers_well(finished_job: FinishedJob):
    assert finished_job.best["dense_accuracy"] > 0.8


def test_best_and_plans_and_jobs_answer_from_the_database(finished_job: FinishedJob, here: Callable[..., Ended]):
    found = here(finished_job.directory, "best", "--model", MODEL, "--task", "easy-vqa", "--json")
    fastest = max(plan["speedup"] for plan in finished_job.result["plans"])
    assert found.code == 0 and json.loads(found.output)["speedup"] == fastest
    strict = here(
        finished_job.directory, "best", "--model", MODEL, "--task", "easy-vqa", "--min-speedup", "50", "--json"
    )
    assert strict.code == 3 and strict.output == "" and "dense model is the answer" in strict.errors
    listed = here(finished_job.directory, "plans", "--model", MODEL, "--json")
    assert {plan["id"] for plan in json.loads(listed.output)} == {plan["id"] for plan in finished_job.result["plans"]}
    (job,) = json.loads(here(finished_job.directory, "jobs", "list", "--json").output)
    assert (job["id"], job["state"], job["task"]) == (finished_job.result["job"], "succeeded", "easy-vqa")


def test_the_same_specification_is_not_run_twice(finished_job: FinishedJob, here: Callable[..., Ended]):
    again = here(finished_job.directory, "run", "job.yaml", "--json")
    assert again.code == 0 and json.loads(again.output) == finished_job.result
    assert "start workers" not in again.errors
    queued = here(finished_job.directory, "submit", "job.yaml", "--json")
    assert json.loads(queued.output) == {"job": finished_job.result["job"], "state": "succeeded", "new": False}


def test_checkpoint_holds_the_kept_layers_only(finished_job: FinishedJob, exported: Path):
    config = json.loads((exported / "config.json").read_text())
    skipped = len(finished_job.best["layers"]["skip"])
    assert config["text_config"]["num_hidden_layers"] == 12 - skipped
    described = json.loads((exported / "skipplan.json").read_text())
    assert described["plan"] == finished_job.best["plan"]
    assert described["figures"]["accuracy"] == finished_job.best["accuracy"]
    assert "auto_map" not in config and not list(exported.glob("*.py"))


def test_an_outsider_reproduces_accuracy_and_logits(finished_job: FinishedJob, exported: Path, held_out: Path):
    figures = outsider(exported, held_out, "--logits", held_out.parent / "logits.pt")
    assert figures["n"] == finished_job.best["n_samples"]
    assert figures["accuracy"] == pytest.approx(finished_job.best["accuracy"])

    theirs = torch.load(held_out.parent / "logits.pt", weights_only=True)
    loaded = load_model(ModelSource(MODEL, device="cpu", dtype="float32"))  # as the job says
    samples = [json.loads(line) for line in held_out.read_text().splitlines()][: len(theirs)]
    inputs = _inputs(loaded.processor, samples, held_out.parent, loaded.model.dtype)
    with torch.inference_mode(), apply(loaded.model, SkipPlan.parse(finished_job.best["plan"])):
        ours = loaded.model(**inputs).logits[:, -1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with torch.inference_mode():
        dense = loaded.model(**inputs).logits[:, -1]
    assert not torch.equal(dense, theirs)


def _inputs(processor, samples, directory, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from exported_accuracy import build_inputs
    inputs = build_inputs(
        processor, samples, [Image.open(directory / each["image"]).convert("RGB") for each in samples]
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs


def test_existing_export_is_kept_unless_forced(finished_job: FinishedJob, exported: Path, here: Callable[..., Ended]):
    before = (exported / "config.json").stat().st_mtime_ns
    plan = str(finished_job.best["id"])
    refused = here(finished_job.directory, "export", plan, "--output", "exported")
    assert refused.code == 2 and "--force" in refused.errors
    assert (exported / "config.json").stat().st_mtime_ns == before
    written = here(finished_job.directory, "export", plan, "--format", "plan", "--output", "plan")
    assert written.code == 0
    described = json.loads((finished_job.directory / "plan" / "skipplan.json").read_text())
    assert described["plan"] == finished_job.best["plan"]
    replaced = here(finished_job.directory, "export", plan, "--format", "plan", "--output", "plan", "--force")
    assert replaced.code == 0
    assert sorted(path.name for path in (finished_job.directory / "plan").iterdir()) == ["README.md", "skipplan.json"]
    assert not [path for path in finished_job.directory.iterdir() if path.name.startswith(".")]


def test_database_is_as_this_version_writes_it(finished_job: FinishedJob, here: Callable[..., Ended]):
    assert here(finished_job.directory, "db", "check").code == 0
