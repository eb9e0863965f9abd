"""What the formats take and write, without loading what was written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from export_builders import document
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import UsageFault
from optimizer.exports.formats import llama_cpp, vllm
from optimizer.exports.writing import export_plan, find_format, require_takes
from optimizer.registries import EXPORT_FORMATS
from workers.messages import ModelSource
from workers.runtime import SkipPlan

FORMATS = tuple(EXPORT_FORMATS.values())
PLANS = st.text("RFBS", min_size=1, max_size=24).map(SkipPlan.parse)


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
    assert "runtime" in taking
    without_code = {"checkpoint", "openvino", "vllm"}
    assert taking & without_code == (set() if plan.needs_vision_tokens else without_code)
    prunable = "S" in plan.text and not plan.needs_vision_tokens and compensation == "none"
    assert ("llama-cpp" in taking) == prunable


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageFault, match="'zip' is unknown; choose one of plan, checkpoint, runtime"):
        find_format("zip")


def llama_cpp_export(model_directory: Path, output: Path) -> Path:
    return export_plan(
        document("RSRRSR", model_directory), ModelSource(str(model_directory)), "llama-cpp", output
    ).directory


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
    scripts = {"vllm": ["serve.sh"], "llama-cpp": ["prune.sh"]}.get(name, [])
    for path in (written.directory.parent, written.directory, *written.directory.rglob("*")):
        executable = path.is_dir() or path.name in scripts
        assert path.stat().st_mode & 0o777 == (0o777 if executable else 0o666) & ~umask, path.name


def run_script(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_llama_cpp_commands_check_the_installed_version_first(model_directory: Path, tmp_path: Path):
    script = llama_cpp_export(model_directory, tmp_path / "export") / "prune.sh"
    here = {"LLAMA_CPP": str(tmp_path)}
    missing = run_script(script, str(tmp_path / "gguf"), **here, SKIPPLAN_LLAMA_QUANTIZE="no-such-program")
    assert missing.returncode == 1 and "no-such-program was not found" in missing.stderr
    old = program(tmp_path / "old", "echo usage: [--allow-requantize]")
    refused = run_script(script, str(tmp_path / "gguf"), **here, SKIPPLAN_LLAMA_QUANTIZE=old)
    assert refused.returncode == 1 and "does not know --prune-layers" in refused.stderr
    assert not (tmp_path / "gguf").exists()
    log = tmp_path / "log"
    new = program(tmp_path / "new", f'echo "[--prune-layers]"; echo "$@" >> {log}')
    python = program(tmp_path / "python", f'echo "$@" >> {log}')
    done = run_script(script, str(tmp_path / "gguf"), "Q8_0", **here, SKIPPLAN_LLAMA_QUANTIZE=new, PYTHON=python)
    assert done.returncode == 0, done.stderr
    _, dense, projector, prune = log.read_text().splitlines()
    assert dense.split()[1] == str(model_directory) and "--mmproj" in projector
    gguf = tmp_path / "gguf"
    assert prune.split() == ["--prune-layers", "1,4", f"{gguf}/dense.gguf", f"{gguf}/pruned.gguf", "Q8_0"]


def test_llama_cpp_says_whether_the_tool_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("SKIPPLAN_LLAMA_QUANTIZE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "llama.cpp is not installed here" in llama_cpp.check()[0]
    monkeypatch.setenv("SKIPPLAN_LLAMA_QUANTIZE", str(tmp_path / "absent"))
    with pytest.raises(UsageFault, match="which is no program"):
        llama_cpp.check()


def test_llama_cpp_refuses_models_with_an_entry_for_each_layer():
    config = {"text_config": {"layer_types": ["full_attention"] * 6, "eos_token_id": [1, 2]}}
    assert llama_cpp.per_layer_lists(config, 6) == ["layer_types"]
    assert llama_cpp.per_layer_lists(config["text_config"], 5) == []


def test_vllm_is_told_the_model_class_only_where_the_configuration_is_silent(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}')
    assert "--hf-overrides" not in vllm.command(tmp_path, "here")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert vllm.needed_overrides(tmp_path) == {"architectures": ["LlavaForConditionalGeneration"]}
    assert "--hf-overrides" in vllm.command(tmp_path, "here")
