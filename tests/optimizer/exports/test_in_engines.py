"""Exports in the engines that serve them, with images, against the live model.

Each needs an engine that variables name; ``docs/how-to/serve.md`` says how they are installed. A start takes a minute.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import smollm2_with_eyes
import tiny_video_families
import torch
from export_builders import document
from safetensors.torch import load_file, save_file

from optimizer.exports import engine_verification
from optimizer.exports.engine_verification import (
    LOGPROB_TOLERANCE,
    TOP_LOGPROBS,
    EngineVerification,
    LiveAnswer,
    ServedAnswer,
    compare,
)
from optimizer.exports.fresh_process import generate_with_logits
from optimizer.exports.verification import verify_export
from optimizer.exports.writing import export_plan
from optimizer.testing import check_engine
from workers.compensation import store
from workers.compensation.compensator import Compensator
from workers.engines.interface import ENGINES, ChatRequest, Serving
from workers.engines.llama_cpp import CONVERTER_VARIABLE, SERVER_VARIABLE
from workers.engines.openvino import PYTHON_VARIABLE as OPENVINO_VARIABLE
from workers.engines.vllm import PYTHON_VARIABLE
from workers.errors import EngineLost
from workers.messages import FitCompensation, ModelSource
from workers.models import prompts
from workers.models.checkpoint import BUNDLED_MODELS, built_directory
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply
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
    print(
        f"\n{found.engine} {found.version}, {found.plan}: {len(found.having('equal'))} of {samples} equal, "
        f"accuracy {found.accuracy.value:.3f} ({found.accuracy.low:.3f} to {found.accuracy.high:.3f}), live "
        f"{found.live_accuracy.value:.3f}, log-probabilities within {found.largest_logprob_difference:.1e}"
    )
    return found


def drafted(directory: Path, model: Path, engine: str, task: str, samples: int) -> EngineVerification:
    """What the engine answers when it serves the dense model with the export as its drafter."""
    found = verify_export(directory, ModelSource(str(model)), task=task, samples=samples, engine=engine)
    assert isinstance(found, EngineVerification) and found.drafts is not None and len(found.answers) == samples
    counts = found.drafts
    print(
        f"\n{found.engine} {found.version}, drafts by {found.plan}: {len(found.having('equal'))} of {samples} equal, "
        f"{counts.accepted} of {counts.drafted} tokens kept in {counts.drafts} drafts"
    )
    assert found.passed, found
    return found


@pytest.fixture(scope="module")
def reference_export(vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(BUNDLED_MODELS / "llava-12", PLAN, "vllm", tmp_path_factory.mktemp("exports") / "vllm")


def test_vllm_answers_as_the_live_model_does(reference_export: Path) -> None:
    found = served(reference_export, BUNDLED_MODELS / "llava-12", 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198 and found.accuracy.value > 0.9
    assert len({answer.live for answer in found.answers.values()}) > 5  # answers that could differ


def test_vllm_answers_by_a_plan_that_joins_layers(vllm: None, tmp_path: Path) -> None:
    """The attention of layer 6 and the MLP of layer 8 are written as one layer."""
    model = BUNDLED_MODELS / "llava-12"
    found = served(exported(model, "RRRRRRMSARSR", "vllm", tmp_path / "export"), model, 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198 and found.accuracy.value > 0.9
    assert len({answer.live for answer in found.answers.values()}) > 5  # answers that could differ


def test_vllm_answers_by_a_plan_that_a_plain_checkpoint_cannot_hold(vllm: None, tmp_path: Path) -> None:
    model = BUNDLED_MODELS / "llava-12"
    found = served(exported(model, "RRRRFRPSQRAR", "vllm", tmp_path / "export"), model, 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198 and found.accuracy.value > 0.9
    assert len({answer.live for answer in found.answers.values()}) > 5  # answers that could differ


def test_vllm_answers_by_a_compensated_plan_of_thirty_layers(vllm: None, tmp_path: Path) -> None:
    """Ten layers skipped, the maps of their gaps in the weights: a plain checkpoint, also for vLLM."""
    model = built_directory("smollm2-30")
    if not model.is_dir():
        pytest.skip("smollm2-30 is not built: skipplan reference build smollm2")
    source = ModelSource(str(model), dtype="float32", device="cpu")
    plan, recipe = "RRRSSSSSRRRRSSSRRSRRRRRRRSRRRR", "linear tokens=4096"
    fitted = Compensator(load_model(source), load_task("easy-vqa")).fit(FitCompensation(plan, recipe))
    maps = store.put(str(tmp_path / "maps"), fitted.content)
    written = document(plan, model, compensation=recipe, artifact_checksum=maps.checksum)
    directory = export_plan(written, source, "vllm", tmp_path / "export", artifact=maps).directory
    found = served(directory, model, 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198 and found.accuracy.value > 0.9
    without = document(plan, model)
    plain = served(export_plan(without, source, "vllm", tmp_path / "plain").directory, model, 8)
    assert plain.accuracy.value < 0.5  # what the maps are for


def test_vllm_answers_as_dense_with_a_drafter_that_sees_the_image(vllm: None, tmp_path: Path) -> None:
    """The plan agrees with dense on nearly every token of scenes; without the image, it would on few."""
    model = BUNDLED_MODELS / "llava-12"
    directory = exported(model, "RRRSRSRSRRRS", "drafter", tmp_path / "drafter")
    found = drafted(directory, model, "vllm", "scenes", 24)
    assert len(found.having("equal")) == 24 and len({answer.live for answer in found.answers.values()}) > 12
    assert found.drafts is not None and found.drafts.accepted > 0.95 * found.drafts.drafted > 0


def test_vllm_keeps_every_draft_of_a_drafter_that_is_the_dense_model(vllm: None, tmp_path: Path) -> None:
    """Of a family whose placeholder vLLM looks up by another name than its configuration has."""
    model = tiny_video_families.save(tmp_path / "model", "internvl", SIZES)
    found = drafted(exported(model, "RRRRRR", "drafter", tmp_path / "drafter"), model, "vllm", "easy-vqa", 6)
    assert found.drafts is not None and found.drafts.accepted == found.drafts.drafted > 0


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


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        (family, plan)
        for family in ("qwen2_vl", "qwen2_5_vl", "internvl")
        for plan in ("RSRRSR", "RMSARR", "RFSAPR", "RQBMRR")
    ]
    # The first two layers of this one take vision features of their own.
    + [("qwen3_vl", plan) for plan in ("RRSRSR", "RRRMAR")]
    # With RMSARR vLLM ends one of this one's sixteen answers before its first token.
    + [("smolvlm", "RSRRSR")],
)
def test_vllm_serves_a_family_by_the_same_log_probabilities(vllm: None, tmp_path: Path, family: str, plan: str) -> None:
    model = tiny_video_families.save(tmp_path / "model", family, SIZES)
    found = served(exported(model, plan, "vllm", tmp_path / "export"), model, 16)
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
    without = asked_without_images(directory, model, "RSRRSR")
    assert [answer.outcome for answer in without] == ["equal"] * len(without)
    assert max(answer.logprob_difference for answer in without) <= found.tolerance


def asked_without_images(directory: Path, model: Path, plan: str) -> list[ServedAnswer]:
    """Ask vLLM and the live model questions of text alone."""
    questions = [
        prompts.prompt_text(load_task("easy-vqa").spec, sample) for sample in load_task("easy-vqa").held_out[:16]
    ]
    requests = [ChatRequest(question, max_tokens=8, top_logprobs=TOP_LOGPROBS) for question in questions]
    with ENGINES["vllm"].serve(directory, Serving(concurrency=1, kv_cache_bytes=2**28, compiled=False)) as server:
        replies = server.ask_all(requests)
    loaded = load_model(ModelSource(str(model), dtype="float32"), device="cpu")
    found = []
    with apply(loaded.model, SkipPlan.parse(plan)):
        for question, reply in zip(questions, replies, strict=True):
            turn = [{"role": "user", "content": [{"type": "text", "text": question}]}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            inputs = loaded.processor.apply_chat_template(turn, **options)
            text, tokens, logits = generate_with_logits(loaded.model, loaded.processor, inputs, 8)
            live = LiveAnswer(text, tuple(inputs["input_ids"][0].tolist()), tuple(tokens), logits)
            found.append(compare(live, reply))
    return found


@pytest.mark.parametrize("plan", ["RSRRSR", "RMSARR"])
def test_llama_cpp_answers_as_the_live_model_does(
    llama_cpp: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    model = tiny_video_families.save(tmp_path / "model", "smolvlm", SIZES, letters=True)
    directory = exported(model, plan, "llama-cpp", tmp_path / "export")
    found = served(directory, model, 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 190  # of random weights, whose largest logits are often close
    assert len({answer.live for answer in found.answers.values()}) > 20  # answers that could differ
    assert json.loads((directory / "config.json").read_text())["text_config"]["num_hidden_layers"] == 4
    monkeypatch.setattr(engine_verification, "_load", with_an_eye_in_float16)
    assert served(directory, model, 60).largest_logprob_difference <= LOGPROB_TOLERANCE  # nothing else differs


def test_llama_cpp_answers_by_a_plan_of_a_trained_language_model(llama_cpp: None, tmp_path: Path) -> None:
    reference = built_directory("smollm2-30")
    if not reference.is_dir():
        pytest.skip("smollm2-30 is not built: skipplan reference build smollm2")
    model = smollm2_with_eyes.save(tmp_path / "model", reference)
    found = served(exported(model, "RRRRRRRRRRRRRSRRRRRRRRRRSRRRRR", "llama-cpp", tmp_path / "export"), model, 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198
    assert len({answer.live for answer in found.answers.values()}) > 5  # answers that could differ


def test_llama_cpp_answers_as_dense_with_a_drafter(llama_cpp: None, tmp_path: Path) -> None:
    reference = built_directory("smollm2-30")
    if not reference.is_dir():
        pytest.skip("smollm2-30 is not built: skipplan reference build smollm2")
    model = smollm2_with_eyes.save(tmp_path / "model", reference)
    directory = exported(model, "RRRRSRSRRRRRSRSRRRRRRRRRRRRRRR", "drafter", tmp_path / "drafter")
    found = drafted(directory, model, "llama.cpp", "easy-vqa", 24)
    assert len(found.having("equal")) == 24
    assert found.drafts is not None and found.drafts.accepted > 0.4 * found.drafts.drafted > 0


def with_an_eye_in_float16(source: ModelSource) -> LoadedModel:
    """Load a model that cuts images into patches and computes GELU in float16, as llama.cpp does."""
    loaded = load_model(replace(source, dtype="float32"), device="cpu")
    tower = loaded.model.model.vision_model

    def half(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.half().float()

    cut = tower.embeddings.patch_embedding
    cut.weight.data = half(cut.weight.data)
    cut.register_forward_pre_hook(lambda module, arguments: (half(arguments[0]),))
    for layer in tower.encoder.layers:
        layer.mlp.activation_fn.register_forward_pre_hook(lambda module, arguments: (half(arguments[0]),))
        layer.mlp.activation_fn.register_forward_hook(lambda module, arguments, values: half(values))
    return loaded


def test_openvino_answers_as_the_live_model_does(tmp_path: Path) -> None:
    if shutil.which(os.environ.get(OPENVINO_VARIABLE, "")) is None:
        pytest.skip(f"{OPENVINO_VARIABLE} names no Python that has optimum-intel")
    model = BUNDLED_MODELS / "llava-12"
    found = served(exported(model, PLAN, "openvino", tmp_path / "openvino"), model, 200)
    assert found.passed, found
    assert len(found.having("equal")) >= 198 and found.accuracy.value > 0.9
