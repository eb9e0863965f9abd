"""No stale answer: single changes to the files of a model, a task and a job, and what is then found again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image
from storage_builders import figures

from optimizer.cli.plans import cautions
from optimizer.job.inputs import JobInputs, prepare, split_hash, task_hash
from optimizer.job.loading import load_job
from optimizer.job.present import PresentVersions, _data_of
from optimizer.service.runner import stored_spec
from optimizer.stages.context import JobFailed
from optimizer.stages.pipeline import check_begun_alike
from storage.database import Database
from storage.pareto import Group
from storage.queue import jobs, leases
from storage.records import lookup, plans
from storage.records.lookup import ModelRecord, TaskRecord
from storage.records.plans import PlanQuery
from workers.models.checkpoint import BUNDLED_MODELS
from workers.tasks.splits import SPLITS

TASK = {
    "name": "shapes",
    "source": {"kind": "file", "path": "rows.jsonl"},
    "prompt": "{question}",
    "answer": {"kind": "short", "max_new_tokens": 4},
    "metric": "exact_match",
    "splits": {"calibration": 2, "search": 2, "held_out": 3, "seed": 0},
}
JOB = {"model": {"path": "model"}, "task": "task.yaml", "search": {"trials": 5}}
QUERY = PlanQuery("model", "shapes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(BUNDLED_MODELS / "llava-12", tmp_path / "model")
    rows = [{"image": f"{n}.png", "question": f"what is {n}?", "answers": str(n)} for n in range(7)]
    for number, row in enumerate(rows):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / row["image"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    return tmp_path


def read(folder: Path) -> JobInputs:
    return prepare(load_job(folder / "job.yaml", environment={}))


def published(db: Database, inputs: JobInputs, plan: str = "RS", **changes: Any) -> int:
    """Publish a plan as a job of these inputs would."""
    job = leases.claim(db, "me", 60, jobs.submit(db, stored_spec(inputs.spec), inputs.spec_hash).id)
    assert job is not None
    model = ModelRecord(
        name=inputs.spec.model.path, fingerprint=inputs.fingerprint, family="llava", num_layers=12, parameters=1
    )
    task = inputs.task
    sizes = {f"{split}_size": len(task.split(split)) for split in SPLITS}
    record = TaskRecord(
        name=task.name, task_hash=task_hash(task), data_hash=task.data_hash, definition_hash=task.definition_hash,
        split_seed=task.spec.splits.seed, **sizes,
    )  # fmt: skip
    group = Group(
        lookup.ensure_model(db, model), lookup.ensure_task(db, record), lookup.ensure_device(db, "cpu"), "batch=1"
    )
    (plan_row,) = plans.publish(db, job, group, [figures(plan, **changes)])
    leases.finish(db, job)
    return plan_row.id


def answered(db: Database, query: PlanQuery = QUERY) -> int | None:
    _data_of.cache_clear()  # another process
    found = plans.best(db, PresentVersions(db).only(query))
    return None if found is None else found.id


Change = Callable[[Path, random.Random], object]


def edited(name: str, change: Callable[[dict[str, Any], random.Random], object]) -> Change:
    def edit(folder: Path, draw: random.Random) -> None:
        file = folder / name
        load, dump = (json.loads, json.dumps) if name.endswith("json") else (yaml.safe_load, yaml.safe_dump)
        content = load(file.read_text())
        change(content, draw)
        file.write_text(dump(content))

    return edit


def row(field: str) -> Change:
    def edit(folder: Path, draw: random.Random) -> None:
        lines = (folder / "rows.jsonl").read_text().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(json.loads(lines[number]) | {field: f"other {draw.random()}"})
        (folder / "rows.jsonl").write_text("\n".join(lines))

    return edit


def flipped(name: str, first: int = 0) -> Change:
    """Change one bit of a file, from its byte ``first`` on."""

    def edit(folder: Path, draw: random.Random) -> None:
        content = bytearray((folder / name).read_bytes())
        content[draw.randrange(first, len(content))] ^= 1
        (folder / name).write_bytes(bytes(content))

    return edit


def drawn(folder: Path, draw: random.Random) -> None:
    Image.new("RGB", (8, 8), (0, 1 + draw.randrange(200), 7)).save(folder / f"{draw.randrange(7)}.png")


def added(name: str) -> Change:
    return lambda folder, draw: (folder / "model" / name).write_text(f'{{"a": {draw.random()}}}')


MODEL: list[Change] = [
    edited("model/config.json", lambda c, d: c["text_config"].update(rms_norm_eps=d.random())),
    edited("model/config.json", lambda c, d: c.update(image_seq_length=d.randrange(99))),
    edited("model/generation_config.json", lambda c, d: c.update(suppress_tokens=[d.randrange(99)])),
    edited("model/processor_config.json", lambda c, d: c["image_processor"].update(do_normalize=False)),
    edited("model/processor_config.json", lambda c, d: c["image_processor"].update(rescale_factor=d.random())),
    edited("model/tokenizer_config.json", lambda c, d: c.update(model_max_length=d.randrange(400))),
    flipped("model/chat_template.jinja"),
    flipped("model/tokenizer.json"),
    flipped("model/model.safetensors", first=100_000),
    added("additional_chat_templates.json"), added("preprocessor_config.json"), added("added_tokens.json"),
]  # fmt: skip
DATA: list[Change] = [row("question"), row("answers"), drawn]
DEFINITION: list[Change] = [
    edited("task.yaml", lambda c, d: c.update(prompt=f"{{question}} {d.random()}")),
    edited("task.yaml", lambda c, d: c.update(plain_prompt=f"{{image}}{{prompt}}{d.random()}")),
    edited("task.yaml", lambda c, d: c["answer"].update(max_new_tokens=5 + d.randrange(99))),
    edited("task.yaml", lambda c, d: c.update(metric=d.choice(["token_f1", "anls"]))),
    edited("task.yaml", lambda c, d: c.update(secondary=[d.choice(["token_f1", "anls"])])),
]
JOBS: list[Change] = [
    edited("task.yaml", lambda c, d: c["splits"].update(seed=1 + d.randrange(99))),
    edited("job.yaml", lambda c, d: c.update(splits={"held_out": 1 + d.randrange(2)})),
    edited("job.yaml", lambda c, d: c["search"].update(seed=1 + d.randrange(99))),
    edited("job.yaml", lambda c, d: c.update(evaluation="plain")),
    edited("job.yaml", lambda c, d: c["model"].update(dtype="bfloat16")),
    edited("job.yaml", lambda c, d: c.update(constraint={"max_accuracy_drop": d.random()})),
]
SAME: list[Change] = [
    edited("model/config.json", lambda c, d: c.update(transformers_version="5.99")),
    edited("model/generation_config.json", lambda c, d: c.update(transformers_version=f"5.{d.randrange(9)}")),
    edited("task.yaml", lambda c, d: c.update(description=f"the same {d.random()}")),
    edited("job.yaml", lambda c, d: c.update(priority=d.randrange(9))),
    lambda folder, draw: (folder / "model" / "README.md").write_text(str(draw.random())),
    lambda folder, draw: (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text().replace(": ", ":   ")),
]
KINDS = {"model files": MODEL, "data": DATA, "prompt, answer or metric": DEFINITION, "job": JOBS, "nothing": SAME}


@pytest.mark.parametrize("count", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_no_single_change_gets_a_stale_answer(folder: Path, store: Database, count: int) -> None:
    before = read(folder)
    plan = published(store, before)
    assert answered(store) == plan
    assert jobs.find_finished(store, before.spec_hash) is not None
    kept = folder.parent / f"{folder.name}-kept"
    shutil.copytree(folder, kept)
    draw = random.Random(count)
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        change = draw.choice(KINDS[kind])
        change(folder, draw)
        _data_of.cache_clear()
        where = (number, kind, KINDS[kind].index(change))
        present = PresentVersions(store).changes(plans.get(store, plan))
        try:
            now = read(folder)
        except Exception:  # a change that makes a file unusable ends the job before anything is found
            assert kind == "model files", where
        else:
            asked = [(each.fingerprint, split_hash(each.task, "search")) for each in (before, now)]
            assert (jobs.find_finished(store, now.spec_hash) is not None) is (kind == "nothing"), where
            if kind in ("model files", "prompt, answer or metric"):
                assert asked[0] != asked[1], where
            elif kind == "nothing":
                assert asked[0] == asked[1], where
        assert present == ((kind,) if kind in ("model files", "data", "prompt, answer or metric") else ()), where
        assert answered(store) == (None if present else plan), where
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert answered(store) == plan


def test_corrected_labels_are_answered_with_their_own_plan(folder: Path, store: Database) -> None:
    old = published(store, read(folder), "RS")
    kept = (folder / "rows.jsonl").read_text()
    row("answers")(folder, random.Random(0))
    new = published(store, read(folder), "SS")
    assert answered(store) == new
    present = PresentVersions(store)
    assert {each.id: present.changes(each) for each in plans.list_plans(store, present.named(QUERY))} == {
        old: ("data",),
        new: (),
    }
    (folder / "rows.jsonl").write_text(kept)
    assert answered(store) == old


def test_files_that_cannot_be_read_leave_the_version_that_was_last_used(folder: Path, store: Database) -> None:
    old = published(store, read(folder), "RS")
    row("answers")(folder, random.Random(0))
    new = published(store, read(folder), "SS")
    shutil.rmtree(folder / "model")
    (folder / "task.yaml").unlink()
    assert answered(store) == new
    assert PresentVersions(store).changes(plans.get(store, old)) == ("data",)


def test_a_task_may_be_named_by_its_file_and_a_model_by_its_fingerprint(folder: Path, store: Database) -> None:
    inputs = read(folder)
    plan = published(store, inputs)
    assert answered(store, PlanQuery(str(folder / "model"), str(folder / "task.yaml"))) == plan
    flipped("model/chat_template.jinja")(folder, random.Random(0))
    assert answered(store) is None
    assert answered(store, PlanQuery(inputs.fingerprint[:12], "shapes")) == plan


def test_other_split_sizes_of_the_same_data_are_the_present_task(folder: Path, store: Database) -> None:
    published(store, read(folder), "RS")
    edited("job.yaml", lambda c, _: c.update(splits={"held_out": 2}))(folder, random.Random(0))
    published(store, read(folder), "SS")
    assert len(plans.list_plans(store, PresentVersions(store).only(QUERY))) == 2


def test_generated_scenes_are_compared_as_many_as_were_drawn(folder: Path, store: Database) -> None:
    job = JOB | {"task": "scenes", "splits": {"calibration": 1, "search": 2, "held_out": 2}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    plan = published(store, read(folder))
    assert answered(store, PlanQuery("model", "scenes")) == plan


def test_a_job_that_goes_on_with_other_inputs_ends_with_their_names(folder: Path, store: Database) -> None:
    job = leases.claim(store, "me", 60, jobs.submit(store, {}, "hash").id)

    def begin(inputs: JobInputs, settings: str = "dtype=float32") -> None:
        from optimizer.stages.context import JobContext

        context = JobContext(store, job, inputs, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
        context.__dict__["settings"] = settings
        check_begun_alike(context)

    begin(read(folder))
    begin(read(folder))
    with pytest.raises(JobFailed, match="was begun before device, dtype, attention and versions changed"):
        begin(read(folder), "dtype=bfloat16")
    row("answers")(folder, random.Random(0))
    with pytest.raises(JobFailed, match="was begun before task changed"):
        begin(read(folder))


def test_a_directory_goes_before_a_name_as_in_job_files(
    folder: Path, store: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited("job.yaml", lambda c, _: c.update(model={"path": "llava-12"}))(folder, random.Random(0))
    bundled = published(store, read(folder), "RS")
    flipped("model/chat_template.jinja")(folder, random.Random(0))
    (folder / "model").rename(folder / "llava-12")
    own = published(store, read(folder), "SS")
    monkeypatch.chdir(folder)
    assert answered(store, PlanQuery("llava-12", "shapes")) == own
    monkeypatch.chdir("/")
    assert answered(store, PlanQuery("llava-12", "shapes")) == bundled


def test_a_plan_that_was_accepted_with_less_confidence_than_usual_is_said_to_be(folder: Path, store: Database) -> None:
    usual, lax = (published(store, read(folder), plan, confidence=level) for plan, level in (("RS", 0.95), ("SS", 0.5)))
    assert cautions(plans.get(store, usual), ()) == []
    (line,) = cautions(plans.get(store, lax), ())
    assert line == f"plan {lax}: its intervals hold with a confidence of 0.5, as its job asked, not 0.95"
