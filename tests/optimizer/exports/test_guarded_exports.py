"""A runtime export with a guard, loaded where nothing of this project can be imported, and its file damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest
from export_builders import document

from optimizer.errors import UsageFault
from optimizer.exports.document import read
from optimizer.exports.guards import FILE_NAME
from optimizer.exports.importing import import_plan
from optimizer.exports.verification import verify_export
from optimizer.exports.writing import export_plan
from storage.database import Database
from workers.compensation import store
from workers.compensation.recipe import CompensationError
from workers.guard.fitter import fit_guards
from workers.messages import Artifact, FitGuards, ModelSource
from workers.models.loading import load_model
from workers.tasks import load_spec, load_task

PLAN = "RRSRFR"

PROGRAM = """
import json, os, shutil, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
export, dense, other = sys.argv[1:]
found = {}
def load(directory):
    return AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
def attempt(name, act):
    try:
        found[name] = act()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
model = load(export)
processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
def answer(one, text):
    conversation = [{"role": "user", "content": [
        {"type": "image", "image": Image.new("RGB", (64, 64), "white")}, {"type": "text", "text": text}]}]
    inputs = processor.apply_chat_template(
        [conversation], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    return one.generate(**inputs, do_sample=False, max_new_tokens=4).tolist()
on, off = "what color is the shape?", "zz zz zz zz qq qq qq qq xx xx xx zz zz zz zz"
attempt("inside", lambda: answer(model, on))
attempt("refused", lambda: answer(model, off))
plain = load(dense)
attempt("other", lambda: model.attach_dense(load(other)))
model.attach_dense(plain)
attempt("outside", lambda: answer(model, off))
found["outside is dense"] = found["outside"] == answer(load(dense), off)
model.guard = None
found["inside is the plan"] = found["inside"] == answer(model, on)
found["dense differs"] = answer(model, off) != found["outside"]
file = Path(export) / "guard" / "guard.safetensors"
kept = file.read_bytes()
file.write_bytes(kept[:-4] + b"0000")
attempt("changed", lambda: load(export))
file.unlink()
attempt("missing", lambda: load(export))
file.write_bytes(kept)
found["ours"] = sorted(name for name in sys.modules if name.partition(".")[0] in ("optimizer", "storage", "workers"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def guard(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    task = load_task(load_spec("easy-vqa").with_splits(calibration=24, search=20, held_out=4, unit="images"))
    with pytest.MonkeyPatch.context() as patch:
        in_process.lock_apart(patch, tmp_path_factory.getbasetemp())
        fitted = fit_guards(load_model(ModelSource(str(model_directory), device="cpu")), task, FitGuards((2,), 0.05))
    return store.put(str(tmp_path_factory.mktemp("guards")), fitted.guards[0].content)


def guarded_document(directory: Path, guard: Artifact) -> Any:
    plain = document(PLAN, directory)
    figures = replace(plain.figures, secondary={"guard": {"checksum": guard.checksum, "false_alarms": 0.05}})
    return plain.model_copy(update={"figures": figures})


@pytest.fixture(scope="module")
def runtime_export(model_directory: Path, guard: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written, output = guarded_document(model_directory, guard), tmp_path_factory.mktemp("exports") / "runtime"
    return export_plan(written, ModelSource(str(model_directory)), "runtime", output, guard=guard).directory


def test_plan_dense_model_and_refusals_in_a_fresh_process(
    runtime_export: Path, model_directory: Path, other_model_directory: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    places = map(str, (runtime_export, model_directory, other_model_directory))
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, *places],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == []
    assert isinstance(found["inside"], list) and found["inside is the plan"]
    assert found["refused"].startswith("GuardError: prompt 0") and "holds no dense model" in found["refused"]
    assert found["outside is dense"] and found["dense differs"], found
    assert "GuardError: the dense model is not the one of this plan" in found["other"]
    assert "is not the guard that the model was written with" in found["changed"]
    assert "guard/guard.safetensors cannot be read beside the model" in found["missing"]


def test_the_export_says_what_it_holds_and_verifies(
    runtime_export: Path, model_directory: Path, loaded_here: None
) -> None:
    card = (runtime_export / "README.md").read_text()
    assert "model.attach_dense(" in card and "refused unless a dense model is attached" in card
    found = verify_export(runtime_export, ModelSource(str(model_directory)), samples=2)
    assert found.passed and FILE_NAME in read(runtime_export).export.files  # type: ignore[union-attr]


@pytest.mark.parametrize("note", ["", "there were too few images"])
def test_a_runtime_export_without_a_guard_says_why(model_directory: Path, tmp_path: Path, note: str) -> None:
    plan, source = document(PLAN, model_directory), ModelSource(str(model_directory))
    figures = replace(plan.figures, secondary={"guard": {"note": note}} if note else {})
    plan = plan.model_copy(update={"figures": figures})
    written = export_plan(plan, source, "runtime", tmp_path / "runtime")
    (found,) = written.notes
    assert found.startswith("no guard, so the plan answers every prompt") and "`skipplan run --force`" in found
    assert (note or "none was fitted for this plan") in found
    assert "Nothing here asks a guard" in (written.directory / "README.md").read_text()
    assert not export_plan(plan, source, "plan", tmp_path / "plan").notes
    drafting = plan.model_copy(update={"mode": "lossless", "figures": replace(figures, extra_bytes=0)})
    assert not any("no guard" in each for each in export_plan(drafting, source, "runtime", tmp_path / "draft").notes)


def test_a_guard_that_is_not_at_hand_is_no_export_without_one(
    model_directory: Path, guard: Artifact, tmp_path: Path
) -> None:
    plan, source = guarded_document(model_directory, guard), ModelSource(str(model_directory))
    with pytest.raises(UsageFault, match="the guard that plan RRSRFR was published with is not at hand"):
        export_plan(plan, source, "runtime", tmp_path / "runtime")
    assert not (tmp_path / "runtime").exists()


def test_only_a_card_of_an_export_that_asks_the_guard_shows_its_figures(
    model_directory: Path, guard: Artifact, tmp_path: Path
) -> None:
    share = {"prompts": 20, "sent": 0.05, "low": 0.01, "high": 0.24}
    figures = {"held_out": share, "tasks": {"scenes": share}, "net_speedup": 1.4321}
    plan = document("RRSRRR", model_directory)
    secondary = {"guard": {"checksum": guard.checksum, "false_alarms": 0.05, **figures}}
    plan = plan.model_copy(update={"figures": replace(plan.figures, secondary=secondary)})
    for name in ("runtime", "checkpoint", "drafter"):
        written = export_plan(plan, ModelSource(str(model_directory)), name, tmp_path / name, guard=guard)
        card = (written.directory / "README.md").read_text()
        assert ("sent to dense by the guard" in card, "1.432" in card) == (name == "runtime", name == "runtime")
        assert ("Nothing here asks a guard" in card) == (name == "checkpoint")


def test_an_imported_plan_takes_its_guard_along(runtime_export: Path, guard: Artifact, tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as database:
        stored = import_plan(database, read(runtime_export), runtime_export)
    assert stored.secondary["guard"]["checksum"] == guard.checksum
    assert Path(stored.secondary["guard"]["artifact"]) == (runtime_export / FILE_NAME).resolve()


def test_a_guard_that_is_gone_or_changed_is_named(model_directory: Path, guard: Artifact, tmp_path: Path) -> None:
    plan, source = guarded_document(model_directory, guard), ModelSource(str(model_directory))
    with pytest.raises(CompensationError, match=r"guard .* cannot be read: .*`skipplan run --force`"):
        export_plan(plan, source, "plan", tmp_path / "a", guard=replace(guard, location=str(tmp_path / "none")))
    changed = tmp_path / "changed"
    changed.write_bytes(b"other")
    with pytest.raises(CompensationError, match=r"guard .*: not what was fitted"):
        export_plan(plan, source, "plan", tmp_path / "b", guard=replace(guard, location=str(changed)))
    written = export_plan(plan, source, "plan", tmp_path / "c", guard=guard).directory
    (written / FILE_NAME).write_bytes(b"other")
    with (
        Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as database,
        pytest.raises(UsageFault, match="is not the guard"),
    ):
        import_plan(database, read(written), written)
