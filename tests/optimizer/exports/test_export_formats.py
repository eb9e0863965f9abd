"""What the formats take and write, without loading what was written."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import tiny_video_families
import torch
from export_builders import document, drafting_document
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig

from optimizer.errors import UsageFault
from optimizer.exports.formats import llama_cpp, vllm
from optimizer.exports.writing import export_plan, find_format, require_takes
from optimizer.registries import EXPORT_FORMATS
from workers.errors import EngineError
from workers.messages import ModelSource
from workers.runtime import SkipPlan

FORMATS = tuple(EXPORT_FORMATS.values())
PLANS = st.text("RFBSAMQP", min_size=1, max_size=24).map(SkipPlan.parse)


@settings(deadline=None)  # a busy machine is no fault of a format's
@given(PLANS, st.sampled_from(["none", "linear"]))
def test_a_refusal_names_exactly_the_formats_that_take_the_plan(plan: SkipPlan, compensation: str):
    taking, refusals = set(), []
    for chosen in FORMATS:
        try:
            require_takes(chosen, plan, compensation)
            taking.add(chosen.name)
        except UsageFault as refusal:
            refusals.append(str(refusal))
    assert "plan" in taking
    for refusal in refusals:
        assert set(refusal.rpartition("formats that can: ")[2].split(", ")) == taking
    assert {"runtime", "vllm"} <= taking
    without_code = {"checkpoint", "drafter", "llama-cpp", "openvino"}
    assert taking & without_code == (without_code if re.fullmatch("(R|S|MS*A)*", plan.text) else set())


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageFault, match="'zip' is unknown; choose one of plan, checkpoint, runtime"):
        find_format("zip")


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("name", [chosen.name for chosen in FORMATS if chosen.name != "openvino"])
def test_exported_files_take_the_users_umask(model_directory: Path, tmp_path: Path, name: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        written = export_plan(
            document("RSRRSR", model_directory), ModelSource(str(model_directory)), name, tmp_path / "new" / "export"
        )
    finally:
        os.umask(before)
    scripts = {"vllm": ["serve.sh"], "llama-cpp": ["convert.sh"]}.get(name, [])
    for path in (written.directory.parent, written.directory, *written.directory.rglob("*")):
        executable = path.is_dir() or path.name in scripts
        assert path.stat().st_mode & 0o777 == (0o777 if executable else 0o666) & ~umask, path.name


@pytest.mark.parametrize("name", ["checkpoint", "vllm"])
def test_a_gap_between_sublayers_is_written_as_plain_layers(model_directory: Path, tmp_path: Path, name: str) -> None:
    plan, source = document("RMSARS", model_directory), ModelSource(str(model_directory))
    directory = export_plan(plan, source, name, tmp_path / name).directory
    config = json.loads((directory / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3 and "skip_plan" not in config
    before, after = load_file(model_directory / "model.safetensors"), load_file(directory / "model.safetensors")
    layers = "language_model.model.layers"
    for part, layer in {
        "self_attn.q_proj": 1,
        "input_layernorm": 1,
        "mlp.up_proj": 3,
        "post_attention_layernorm": 3,
    }.items():
        assert torch.equal(after[f"{layers}.1.{part}.weight"], before[f"{layers}.{layer}.{part}.weight"]), part


def test_vllm_is_given_what_a_plain_checkpoint_cannot_hold_by_a_type_that_nothing_else_loads(
    model_directory: Path, tmp_path: Path
) -> None:
    plan, source = document("RFSAPR", model_directory), ModelSource(str(model_directory))
    directory = export_plan(plan, source, "vllm", tmp_path / "export").directory
    config = json.loads((directory / "config.json").read_text())
    assert (config["skip_plan"], config["text_config"]["num_hidden_layers"]) == ("RFAPR", 5)
    card = (directory / "README.md").read_text()
    assert "needs the plug-in `skipplan-vllm`" in card and "splits the remaining layers" not in card
    served = (directory / "serve.sh").read_text()
    assert "--enforce-eager" in served and "prefix-caching" not in served
    with pytest.raises(ValueError, match="skipplan_llava"):
        AutoConfig.from_pretrained(directory)
    with pytest.raises(UsageFault, match="SKIPPLAN_VLLM_PYTHON, or export with --format runtime"):
        vllm.FORMAT.loadable(directory, tmp_path, "python")


@pytest.mark.parametrize(
    ("plan", "options"),
    [("RRMRAR", ""), ("RQRRRR", " --enforce-eager"), ("RBRRRR", " --enforce-eager --no-enable-prefix-caching")],
)
def test_vllm_is_served_with_the_options_that_a_plan_needs(tmp_path: Path, plan: str, options: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "skipplan_llava", "skip_plan": plan}))
    assert vllm.command(tmp_path, "here") == "exec vllm serve here --limit-mm-per-prompt '{\"image\": 1}'" + options


def test_vllm_takes_code_for_the_families_of_its_plug_in_alone(tmp_path: Path) -> None:
    model = tiny_video_families.save(tmp_path / "model", "smolvlm")
    with pytest.raises(UsageFault, match=r"of llava, qwen2_vl, .*, not of smolvlm; formats .*: plan, runtime"):
        export_plan(document("RFRRRR", model), ModelSource(str(model)), "vllm", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_lossless_plan_that_would_answer_alone_is_written_with_a_note(model_directory: Path, tmp_path: Path) -> None:
    drafting = drafting_document("RSRRSR", model_directory)
    source = ModelSource(str(model_directory))
    alone = export_plan(drafting, source, "checkpoint", tmp_path / "alone")
    assert any("formats that draft are runtime, drafter" in note for note in alone.notes)
    assert "This is a drafter." in (tmp_path / "alone" / "README.md").read_text()
    assert not export_plan(drafting, source, "drafter", tmp_path / "drafter").notes
    standalone = export_plan(document("RSRRSR", model_directory), source, "checkpoint", tmp_path / "standalone")
    assert not standalone.notes and "drafter" not in (tmp_path / "standalone" / "README.md").read_text()


def run_script(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_llama_cpp_commands_convert_and_quantise_where_asked(model_directory: Path, tmp_path: Path):
    export = export_plan(
        document("RSRRSR", model_directory), ModelSource(str(model_directory)), "llama-cpp", tmp_path / "x"
    )
    assert "vision tower is a CLIP one" in (export.directory / "README.md").read_text()  # which it cannot convert
    script, log, gguf = export.directory / "convert.sh", tmp_path / "log", tmp_path / "gguf"
    here = {"LLAMA_CPP": str(tmp_path), "PYTHON": program(tmp_path / "python", f'echo "$@" >> {log}')}
    missing = run_script(script, str(gguf), "Q8_0", **here, QUANTIZE="no-such-program")
    assert missing.returncode == 1 and "no-such-program was not found" in missing.stderr and not gguf.exists()
    assert run_script(script, str(gguf), **here).returncode == 0
    assert log.read_text().splitlines() == [
        f"{tmp_path}/convert_hf_to_gguf.py {script.parent} --outfile {gguf}/model.gguf",
        f"{tmp_path}/convert_hf_to_gguf.py {script.parent} --mmproj --outfile {gguf}/mmproj.gguf",
    ]
    (gguf / "model.gguf").write_text("large")
    quantise = program(tmp_path / "quantise", f'echo "$@" >> {log}; echo small > "$2"')
    assert run_script(script, str(gguf), "Q8_0", **here, QUANTIZE=quantise).returncode == 0
    assert log.read_text().splitlines()[-1] == f"{gguf}/model.gguf {gguf}/quantised.gguf Q8_0"
    assert {path.name: path.read_text() for path in gguf.iterdir()} == {"model.gguf": "small\n"}


@pytest.mark.parametrize(
    ("chosen", "variable", "tool"),
    [(llama_cpp, "SKIPPLAN_LLAMA_SERVER", "llama-server"), (vllm, "SKIPPLAN_VLLM_PYTHON", "vllm")],
)
def test_it_is_said_whether_the_engine_is_here(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model_directory: Path,
    chosen: ModuleType,
    variable: str,
    tool: str,
):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (said,) = chosen.check()
    assert said.startswith("it was not served: ") and tool in said and variable in said
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with pytest.raises(EngineError, match="which is no program"):
        export_plan(
            document("RSRRSR", model_directory), ModelSource(str(model_directory)), chosen.FORMAT.name, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_vllm_is_told_the_model_class_only_where_the_configuration_is_silent(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}')
    assert "--hf-overrides" not in vllm.command(tmp_path, "here")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert vllm.needed_overrides(tmp_path) == {"architectures": ["LlavaForConditionalGeneration"]}
    assert "--hf-overrides" in vllm.command(tmp_path, "here")
