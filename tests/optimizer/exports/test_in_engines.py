"""Exports in the engines that serve them, with images, against the live model.

Each needs an engine that variables name; ``docs/how-to/serve.md`` says how they are installed. A start takes a minute.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_video_families
from export_builders import document
from safetensors.torch import load_file, save_file

from optimizer.exports.engine_verification import EngineVerification
from optimizer.exports.verification import verify_export
from optimizer.exports.writing import export_plan
from optimizer.testing import check_engine
from workers.engines.interface import ENGINES, Serving
from workers.engines.llama_cpp import CONVERTER_VARIABLE, SERVER_VARIABLE
from workers.engines.vllm import PYTHON_VARIABLE
from workers.errors import EngineLost
from workers.messages import ModelSource
from workers.models import prompts
from workers.models.checkpoint import BUNDLED_MODELS
from workers.tasks import load_task

pytestmark = pytest.mark.slow
PLAN = "RRRSRRSRRRSR"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads of 32 dimensions: engines have kernels for multiples of that."""


@pytest.fixture(scope="module")
def vllm() -> None:
    if shutil.which(os.environ.get(PYTHON_VARIABLE, "")) is None:
        pytest.skip(f"{PYTHON_VARIABLE} names no Python that has vLLM")


@pytest.fixture(scope="module")
def llama_cpp() -> None:
    for variable in (SERVER_VARIABLE, CONVERTER_VARIABLE):
        if not Path(os.environ.get(variable, "absent")).is_file():
            pytest.skip(f"{variable} names no file of llama.cpp's")


def exported(model: Path, plan: str, format_name: str, output: Path) -> Path:
    return export_plan(document(plan, model), ModelSource(str(model)), format_name, output).directory


def served(directory: Path, model: Path, samples: int) -> EngineVerification:
    found = verify_export(directory, ModelSource(str(model)), samples=samples)
    assert isinstance(found, EngineVerification) and len(found.answers) == samples
    return found


@pytest.fixture(scope="module")
def reference_export(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(BUNDLED_MODELS / "llava-12", PLAN, "vllm", tmp_path_factory.mktemp("exports") / "vllm")


def test_vllm_answers_as_the_live_model_does(reference_export: Path) -> None:
    found = served(reference_export, BUNDLED_MODELS / "llava-12", 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198 and found.accuracy.value > 0.9
    assert len({answer.live for answer in found.answers.values()}) > 5  # answers that could differ


def test_vllm_keeps_the_contract_of_engines(reference_export: Path) -> None:
    pictures = []
    for sample in load_task("easy-vqa").held_out[:1]:
        stream = io.BytesIO()
        sample.image.open().save(stream, "PNG")
        pictures.append(stream.getvalue())
    check_engine(ENGINES["vllm"], reference_export, pictures)


def test_vllm_names_a_tensor_that_it_does_not_know(reference_export: Path, tmp_path: Path) -> None:
    """What the model's own directory would be: names of transformers alone."""
    directory = tmp_path / "renamed"
    shutil.copytree(reference_export, directory)
    file = directory / "model.safetensors"
    tensors = {name.replace(".vision_model.", "."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with (
        pytest.raises(
            EngineLost, match=r"vllm does not start .*no module or parameter named 'vision_tower\.embeddings'"
        ),
        ENGINES["vllm"].serve(directory, Serving(kv_cache_bytes=2**28, compiled=False)),
    ):
        pass


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm"])
def test_vllm_serves_a_family_by_the_same_log_probabilities(vllm: None, tmp_path: Path, family: str) -> None:
    model = tiny_video_families.save(tmp_path / "model", family, SIZES)
    found = served(exported(model, "RSRRSR", "vllm", tmp_path / "export"), model, 16)
    assert found.passed, found


def test_gemma_3_does_not_pass_where_vllm_lets_image_tokens_see_earlier_ones_alone(
    vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image tokens see one another; vLLM's attention for CPUs has no such mask, and computes something else."""
    model = tiny_video_families.save(tmp_path / "model", "gemma3", SIZES)
    directory = exported(model, "RSRRSR", "vllm", tmp_path / "export")
    found = served(directory, model, 16)
    assert not found.passed and found.largest_logprob_difference > 10 * found.tolerance

    def causal(*arguments: Any) -> Any:
        return {name: value for name, value in build_inputs(*arguments).items() if name != "token_type_ids"}

    build_inputs = prompts.build_inputs
    monkeypatch.setattr(prompts, "build_inputs", causal)  # which says the live model where its images are
    assert served(directory, model, 16).passed


def test_llama_cpp_answers_as_the_live_model_does(llama_cpp: None, tmp_path: Path) -> None:
    model = tiny_video_families.save(tmp_path / "model", "smolvlm", SIZES, letters=True)
    found = served(exported(model, "RSRRSR", "llama-cpp", tmp_path / "export"), model, 32)
    assert found.passed, found
    assert json.loads((tmp_path / "export/config.json").read_text())["text_config"]["num_hidden_layers"] == 4
