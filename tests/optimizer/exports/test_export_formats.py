"""What the formats take and write, without loading what was written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from export_builders import document
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import UsageFault
from optimizer.exports import llama_cpp, mergekit, registry, vllm
from optimizer.exports.writing import export_plan
from optimizer.registries import EXPORT_FORMATS
from workers.messages import ModelSource
from workers.runtime import SkipPlan

PLANS = st.text("RFBS", min_size=1, max_size=24).map(SkipPlan.parse)


@given(PLANS, st.sampled_from(["none", "linear"]))
def test_a_refusal_names_exactly_the_formats_that_take_the_plan(plan: SkipPlan, compensation: str):
    taking, refusals = set(), []
    for chosen in EXPORT_FORMATS.values():
        try:
            registry.require_takes(chosen, plan, compensation)
            taking.add(chosen.name)
        except UsageFault as refusal:
            refusals.append(str(refusal))
    assert "plan" in taking
    for refusal in refusals:
        assert set(refusal.rpartition("formats that can: ")[2].split(", ")) == taking
    assert "runtime" in taking
    without_code = {"checkpoint", "mergekit", "openvino", "vllm"}
    assert taking & without_code == (set() if plan.needs_vision_tokens else without_code)
    prunable = "S" in plan.text and not plan.needs_vision_tokens and compensation == "none"
    assert ("llama-cpp" in taking) == prunable


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageFault, match="'zip' is unknown; choose one of plan, checkpoint, runtime"):
        registry.find("zip")


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_mergekit_slices_hold_the_kept_layers_in_order(keep: list[bool]):
    plan = SkipPlan.skipping(len(keep), [layer for layer, kept in enumerate(keep) if not kept])
    names = ["lm_head.weight", "t.layers.0.w", "t.layers.1.w", "v.blocks.0.w", "v.blocks.0.list.3.w"]
    written = mergekit.passthrough(plan, "dense", "t.layers", names)
    assert written["merge_method"] == "passthrough" and set(written["modules"]) == {"t.layers", "v.blocks", "default"}
    layers: list[int] = []
    for piece in written["modules"]["t.layers"]["slices"]:
        (source,) = piece["sources"]
        assert source["model"] == "dense"
        layers += range(*source["layer_range"])
    assert layers == [layer for layer, kept in enumerate(keep) if kept]
    assert written["modules"]["v.blocks"] == written["modules"]["default"] == {"models": [{"model": "dense"}]}


def test_mergekit_of_a_model_with_one_list_of_layers_needs_no_modules():
    written = mergekit.passthrough(SkipPlan.parse("RSR"), "dense", "model.layers", ["model.layers.0.w", "lm_head.w"])
    assert [piece["sources"][0]["layer_range"] for piece in written["slices"]] == [[0, 1], [2, 3]]
    assert "modules" not in written


def test_mergekit_export_names_the_models_own_modules(model_directory: Path, tmp_path: Path):
    written = export_plan(
        document("RSRRSR", model_directory), ModelSource(str(model_directory)), "mergekit", tmp_path / "m"
    )
    configuration = yaml.safe_load((written.directory / "mergekit.yml").read_text())
    assert "model.language_model.layers" in configuration["modules"]
    assert (written.directory / "source" / "model.safetensors").is_file()  # stored under other names than in memory
    assert {"config.json", "processor_config.json"} <= {
        f.name for f in (written.directory / "checkpoint-files").iterdir()
    }


def llama_cpp_export(model_directory: Path, output: Path) -> Path:
    return export_plan(
        document("RSRRSR", model_directory), ModelSource(str(model_directory)), "llama-cpp", output
    ).directory


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
