"""Exports of a model with random weights, loaded where nothing of this project can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_builders import document, drafting_document
from safetensors import safe_open

from optimizer.errors import UsageFault
from optimizer.exports.formats.runtime import changed_code, runtime_modules
from optimizer.exports.verification import verify_export
from optimizer.exports.writing import export_plan
from workers.messages import ModelSource

MIXED = "ASMQPB"


@pytest.fixture(scope="module")
def runtime_export(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "runtime"
    return export_plan(document(MIXED, model_directory), ModelSource(str(model_directory)), "runtime", output).directory


@pytest.fixture(scope="module")
def checkpoint_export(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "checkpoint"
    plan = document("SRRSRR", model_directory)
    return export_plan(plan, ModelSource(str(model_directory)), "checkpoint", output).directory


def test_a_checkpoint_answers_in_a_fresh_process(checkpoint_export: Path, model_directory: Path):
    found = verify_export(checkpoint_export, ModelSource(str(model_directory)), samples=2)
    assert found.passed and len(found.answers) == 2, found
    assert found.model_class == "LlavaForConditionalGeneration"


def test_a_mixed_plan_answers_in_a_fresh_process(runtime_export: Path, model_directory: Path):
    found = verify_export(runtime_export, ModelSource(str(model_directory)), samples=2)
    assert found.passed and len(found.answers) == 2, found
    assert found.model_class == "SkipPlanForImageTextToText"


def test_the_weights_of_what_is_left_out_are_not_written(runtime_export: Path):
    with safe_open(runtime_export / "model.safetensors", "pt") as file:
        stored = file.keys()
    names = [name.partition("language_model.layers.")[2] for name in stored]
    written = {(name.split(".")[0], name.split(".")[1]) for name in names if name}
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    gone = {"A": {"self_attn", "input_layernorm"}, "M": {"mlp", "post_attention_layernorm"}}
    kept = MIXED.replace("S", "")
    assert written == {(str(new), part) for new, letter in enumerate(kept) for part in parts - gone.get(letter, set())}


def test_another_plan_does_not_pass(checkpoint_export: Path, model_directory: Path, loaded_here: None):
    """Verification can fail: the document of another plan beside the same weights."""
    file = checkpoint_export / "skipplan.json"
    kept = file.read_text()
    file.write_text(kept.replace('"SRRSRR"', '"RRSSRR"'))
    try:
        assert not verify_export(checkpoint_export, ModelSource(str(model_directory)), samples=2).passed
    finally:
        file.write_text(kept)


def isolated(program: str, directory: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-I", "-c", program, str(directory), *arguments],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


THREE_LINES = """
import sys; directory = sys.argv[1]
sys.path.insert(0, directory)
from skipplan_runtime.modeling import SkipPlanForImageTextToText
model = SkipPlanForImageTextToText.from_pretrained(directory)
print(model.config.skip_plan, len(model.model.language_model.layers), "workers" in sys.modules)
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code" in str(error))
"""


def test_three_lines_load_it_and_without_the_code_it_does_not_load(runtime_export: Path, tmp_path: Path):
    done = isolated(THREE_LINES, runtime_export, tmp_path)
    assert done.stdout.splitlines() == ["AMQPB 5 False", "True"], done.stderr[-2000:]


LOSSLESS = """
import sys; directory, model = sys.argv[1], sys.argv[2]
sys.path.insert(0, directory)
import torch
from skipplan_runtime import speculate_from
from transformers import AutoModelForImageTextToText
dense = AutoModelForImageTextToText.from_pretrained(model).eval()
inputs = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
with speculate_from(dense, directory, draft_length=3) as speculation:
    found = speculation.generate(**inputs, **options)
    print(torch.equal(found, dense.generate(**inputs, **options)), speculation.statistics.drafted > 0)
print("workers" in sys.modules)
"""


def test_a_runtime_export_drafts_for_the_dense_model_in_a_fresh_process(model_directory: Path, tmp_path: Path):
    plan, source = document("RSRRSR", model_directory), ModelSource(str(model_directory))
    directory = export_plan(plan, source, "runtime", tmp_path / "runtime").directory
    assert f'speculate_from(dense, "{directory.name}")' in (directory / "README.md").read_text()
    done = isolated(LOSSLESS, directory, tmp_path, str(model_directory))
    assert done.stdout.splitlines() == ["True True", "False"], done.stderr[-2000:]


def test_a_lossless_runtime_export_is_verified_as_a_drafter(model_directory: Path, tmp_path: Path):
    source = ModelSource(str(model_directory))
    written = export_plan(drafting_document("RSRRSR", model_directory), source, "runtime", tmp_path / "runtime")
    assert any("speculate_from drafts" in note for note in written.notes)
    card = (written.directory / "README.md").read_text()
    assert "speculate_from" in card and "trust_remote_code" not in card
    found = verify_export(written.directory, source, samples=2)
    assert found.passed and len(found.answers) == 2, found
    assert found.model_class == "LlavaForConditionalGeneration"
    assert any("the dense model passed" in note for note in found.notes)
    with pytest.raises(UsageFault, match="--engine: a runtime export of a lossless plan drafts by its own"):
        verify_export(written.directory, source, engine="fake")


def test_the_code_is_the_workers_own_and_changed_code_is_not_run(
    runtime_export: Path, model_directory: Path, tmp_path: Path
):
    code = runtime_export / "skipplan_runtime"
    for module in runtime_modules():
        assert (code / module.name).read_bytes() == module.read_bytes()
    assert changed_code(runtime_export) == []
    modeling = code / "modeling.py"
    kept = modeling.read_text()
    try:
        modeling.write_text(kept + "import os\n")
        assert changed_code(runtime_export) == ["modeling.py"]
        with pytest.raises(UsageFault, match=r"modeling\.py is not as it was written"):
            verify_export(runtime_export, ModelSource(str(model_directory)))
    finally:
        modeling.write_text(kept)
    (code / "more.py").touch()
    try:
        assert changed_code(runtime_export) == ["more.py"]
        with pytest.raises(UsageFault, match="was added after"):
            verify_export(runtime_export, ModelSource(str(model_directory)))
    finally:
        (code / "more.py").unlink()


def test_every_export_has_its_document_and_card(checkpoint_export: Path, model_directory: Path, tmp_path: Path):
    written = json.loads((checkpoint_export / "skipplan.json").read_text())
    assert written["export"]["format"] == "checkpoint"
    assert written["export"]["model_fingerprint"] == written["model"]["fingerprint"]
    assert set(written["export"]["versions"]) >= {"skipplan", "torch", "transformers", "python"}
    present = {path.name for path in checkpoint_export.iterdir()}
    assert set(written["export"]["files"]) | {"skipplan.json", "README.md"} == present
    assert "0.8700 to 0.9300" in (checkpoint_export / "README.md").read_text()
    plan = document(MIXED)
    export_plan(plan, ModelSource("nowhere"), "plan", tmp_path / "plan")
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["README.md", "skipplan.json"]
    found = verify_export(tmp_path / "plan", ModelSource("nowhere"))
    assert found.passed and not found.loaded


def test_a_damaged_export_is_refused(checkpoint_export: Path, model_directory: Path):
    config = checkpoint_export / "config.json"
    kept = config.read_bytes()
    try:
        config.write_bytes(kept + b" ")
        with pytest.raises(UsageFault, match=r"config\.json is not as it was written"):
            verify_export(checkpoint_export, ModelSource(str(model_directory)))
        config.unlink()
        with pytest.raises(UsageFault, match=r"config\.json is missing"):
            verify_export(checkpoint_export, ModelSource(str(model_directory)))
    finally:
        config.write_bytes(kept)


def test_another_model_is_refused_unless_forced(model_directory: Path, other_model_directory: Path, tmp_path: Path):
    plan, other = document("RRSRRR", model_directory), ModelSource(str(other_model_directory))
    for name in ("checkpoint", "llama-cpp"):
        with pytest.raises(UsageFault, match=r"fingerprint is .*--force-model"):
            export_plan(plan, other, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = export_plan(plan, other, "checkpoint", tmp_path / "out", force_model=True)
    assert written.document.export is not None
    assert written.document.export.model_fingerprint != plan.model.fingerprint == written.document.model.fingerprint
    assert "not of this model" in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_of_another_length_is_refused_even_by_force(model_directory: Path, tmp_path: Path):
    with pytest.raises(UsageFault, match="5 layers, the llava model has 6"):
        export_plan(
            document("RRSRR"), ModelSource(str(model_directory)), "checkpoint", tmp_path / "o", force_model=True
        )
    assert list(tmp_path.iterdir()) == []
