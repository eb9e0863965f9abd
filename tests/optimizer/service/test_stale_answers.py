"""No stale answer of the product: after a change, what a database with older jobs answers is what an empty one does.

Jobs run in this process, without Ray, from the lookup of a finished job to the export.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch
import yaml
from PIL import Image
from processes import TASK, tiny_job
from safetensors.torch import load_file, save_file

from optimizer.errors import UsageFault
from optimizer.exports.writing import export_published
from optimizer.job.inputs import JobInputs, model_source, prepare
from optimizer.job.loading import load_job
from optimizer.job.present import PresentVersions, _data_of
from optimizer.service import runner
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs
from storage.queue.jobs import Job
from storage.records import evaluations, plans
from storage.records.plans import Plan, PlanQuery
from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.evaluation.plain import PlainEvaluator
from workers.messages import ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan

PLANS = ("RRRSRR", "RSRRRR")


class Pool(in_process.OneWorker):
    """A pool for one job."""

    def __init__(self, inputs: JobInputs) -> None:
        self.handler = Handler.load(model_source(inputs.spec), inputs.task, WorkerSettings(0, batch_size=8))
        self.info, self.size, self.requests = (self.handler.info,), 1, []
        self.fingerprint = self.handler.info.fingerprint


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a task and a job file, which tries two plans."""

    @contextmanager
    def open_pool(inputs: JobInputs, progress: Progress) -> Iterator[Pool]:
        yield Pool(inputs)

    monkeypatch.setattr(runner, "open_pool", open_pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as the jobs' own worker says
    shutil.copytree(tiny_model, tmp_path / "x" / "model")
    shutil.move(tmp_path / "x" / "model" / Path(TASK).parent, tmp_path / "x" / "task")
    job = tiny_job(tmp_path / "x" / "model", 0).model_dump(mode="json", exclude={"database", "artifacts"})
    job["task"] = str(tmp_path / "x" / TASK)
    job["criterion"], job["thresholds"] = "block-influence", {}
    job["splits"] = {"calibration": 4, "search": 8, "held_out": 16, "unit": "samples"}
    job["constraint"] |= {"min_dense_accuracy": 0.0}
    job["search"] |= {"plans": list(PLANS), "trials": 2, "strategy": "random", "rungs": [8]}
    (tmp_path / "x" / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path / "x"


@dataclass(frozen=True)
class Answered:
    """What a job and its database answer."""

    job: Job
    scores: dict[tuple[str, str], tuple[float, ...]]
    published: dict[str, tuple[float, ...]]

    @classmethod
    def by(cls, db: Database, folder: Path) -> Answered:
        """Run the job file as the command does."""
        inputs = prepare(load_job(folder / "job.yaml", environment={}))
        known = jobs.find_finished(db, inputs.spec_hash)
        job = known or runner.run_job(db, inputs, Progress(), anew=False)
        assert job.state in ("succeeded", "infeasible"), job.error
        scores = {(each.plan, each.split): each.scores for each in evaluations.for_job(db, job.id)}
        return cls(job, scores, {each.plan: figures(each) for each in plans.for_job(db, job.id)})


def figures(plan: Plan) -> tuple[float, ...]:
    return (
        plan.n_samples,
        plan.accuracy,
        plan.dense_accuracy,
        plan.difference,
        plan.difference_low,
        plan.kv_cache_bytes,
    )


def best(db: Database) -> Plan | None:
    _data_of.cache_clear()  # another process
    return plans.best(db, PresentVersions(db).only(PlanQuery("model", "tiny")))


Change = Callable[[Path], object]


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(folder: Path) -> None:
        file = folder / name
        load, dump = (json.loads, json.dumps) if name.endswith("json") else (yaml.safe_load, yaml.safe_dump)
        content = load(file.read_text())
        change(content)
        file.write_text(dump(content))

    return edit


def replaced(name: str, old: str, new: str) -> Change:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return edit


def turned_weights(folder: Path) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    name = next(each for each in tensors if each.endswith("lm_head.weight"))
    save_file(tensors | {name: tensors[name].roll(1, 0)}, folder / "model" / "model.safetensors", {"format": "pt"})


def painted(folder: Path) -> None:
    for number, image in enumerate(sorted((folder / "task").glob("*.png"))):
        Image.new("RGB", (64, 64), (250, number, 90)).save(image)


def corrected(folder: Path) -> None:
    header, *rows = (folder / "task" / "data.csv").read_text().splitlines()
    kept = [row if number % 3 else f"{row.rpartition(',')[0]},corrected" for number, row in enumerate(rows)]
    (folder / "task" / "data.csv").write_text("\n".join([header, *kept]))


MODEL: dict[str, Change] = {
    "weights": turned_weights,
    "config": edited("model/config.json", lambda c: c["text_config"].update(rms_norm_eps=0.9)),
    "generation config": edited("model/generation_config.json", lambda c: c.update(repetition_penalty=9.0)),
    "processor": edited("model/processor_config.json", lambda c: c["image_processor"].update(do_normalize=False)),
    "chat template": replaced("model/chat_template.jinja", "ASSISTANT:", "triangle blue no"),
    "tokenizer": edited(
        "model/tokenizer.json",
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": "is"}, "content": "shape"}),
    ),
}
TASKS: dict[str, Change] = {
    "labels": corrected,
    "images": painted,
    "questions": replaced("task/data.csv", "?", " in the image yes or no?"),
    "prompt": replaced(TASK, "{question}", "what shape is green? {question}"),
    "metric": replaced(TASK, "exact_match", "anls"),
    "answer": replaced(TASK, "max_new_tokens: 2", "max_new_tokens: 1"),
}
JOBS: dict[str, Change] = {
    "split": edited("job.yaml", lambda c: c["splits"].update(held_out=12)),
    "path": edited("job.yaml", lambda c: c.update(evaluation="plain")),
    "dtype": edited("job.yaml", lambda c: c["model"].update(dtype="bfloat16")),
}
CHANGES = MODEL | TASKS | JOBS
QUICK = ("chat template", "labels")


@pytest.mark.slow  # the identities themselves are tested one by one; here jobs are run
@pytest.mark.parametrize("names", [QUICK, tuple(CHANGES)], ids=["some", "all"])
def test_after_a_change_the_answer_is_that_of_an_empty_database(
    folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    shutil.copytree(folder, tmp_path / "kept")
    changed = 0
    present: set[tuple[float, ...]] = set()
    with Database.open(f"sqlite:///{tmp_path / 'old.db'}") as db:
        first = Answered.by(db, folder)
        assert first.published.keys() == set(PLANS)
        assert Answered.by(db, folder) == first  # found again
        original = best(db)
        assert original is not None
        for name in names:
            CHANGES[name](folder)
            with Database.open(f"sqlite:///{tmp_path / name}.db") as empty:
                expected = Answered.by(empty, folder)
            found = Answered.by(db, folder)
            assert (found.scores, found.published) == (expected.scores, expected.published), name
            changed += expected.scores != first.scores
            answer = best(db)
            assert answer is not None, name
            if name in JOBS:
                present |= set(found.published.values())
            else:
                assert answer.job_id == found.job.id != first.job.id, name
            if (
                answer.job_id == found.job.id
            ):  # another split or dtype is of the same task: the fastest plan is the answer
                assert figures(answer) == expected.published[answer.plan], name
                _check_export(db, answer, expected, folder, tmp_path / name)
            if name in MODEL:
                with pytest.raises(UsageFault, match="is not the one that the plan was measured on"):
                    export_published(db, original, "checkpoint", tmp_path / "stale")
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "kept", folder)
        again = best(db)
        assert again is not None and figures(again) in present | set(first.published.values())
    assert changed >= 0.7 * len(names), f"only {changed} of {len(names)} changes would show a stale answer"


def _check_export(db: Database, plan: Plan, expected: Answered, folder: Path, output: Path) -> None:
    """What is written answers as the plan did where it was verified."""
    export_published(db, plan, "checkpoint", output)
    spec = load_job(folder / "job.yaml", environment={})
    task = prepare(spec).task
    dtype = "float32" if spec.model.dtype == "auto" else spec.model.dtype
    loaded = load_model(ModelSource(str(output), device="cpu", dtype=dtype))
    written = PlainEvaluator(loaded, task, batch_size=8).evaluate(SkipPlan.dense(5), "held_out")
    assert written.scores == expected.scores[plan.plan, "held_out"], output.name
