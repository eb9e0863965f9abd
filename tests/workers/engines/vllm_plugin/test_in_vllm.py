"""Plans in vLLM against transformers: every log-probability of every generated token.

``SKIPPLAN_VLLM_PYTHON`` names an interpreter that holds vLLM; the plug-in is built and installed beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llava
import tiny_video_families
import torch
from export_builders import document
from PIL import Image
from torch import nn

from optimizer.exports.writing import export_plan
from workers.messages import ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan, apply

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
PLUGIN = ROOT / "workers" / "engines" / "vllm_plugin"
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads of 32, the smallest that vLLM's attention on a CPU takes."""
LAYERS, NEW_TOKENS = 6, 6
PICTURES = {
    "llava": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}
BOUND = 2e-3
"""Of log-probabilities, which lie between 0 and -20: other kernels sum in another order, also in the dense model."""

BLOCK, CACHE_BYTES = 32, 8 << 20
SERVED = {
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": CACHE_BYTES,
    "limit_mm_per_prompt": {"image": 3},
    "max_num_seqs": 4,
}
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 8}
"""Less than a picture of LLaVA, so that steps hold vision tokens alone."""


@dataclass(frozen=True)
class Request:
    prompt: str
    images: tuple[str, ...]


Waves = Sequence[Sequence[Request]]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """The interpreter, and an environment in which it finds the plug-in."""
    python = os.environ.get("SKIPPLAN_VLLM_PYTHON")
    if not python or shutil.which(python) is None:
        pytest.skip("SKIPPLAN_VLLM_PYTHON names no program: a Python with vLLM")
    beside = tmp_path_factory.mktemp("plugin")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside), str(PLUGIN)]
    subprocess.run(install, check=True, capture_output=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return python, inherited | {"PYTHONPATH": str(beside), "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def build(family: str, directory: Path) -> Path:
    if family == "llava":
        return tiny_llava.save(directory, sizes=SIZES)
    tiny_video_families.save(directory, family, sizes=SIZES)
    # The older transformers beside vLLM reads `min_pixels` and `max_pixels` otherwise than today's.
    _, processor = loaded(directory)
    for file in directory.glob("*processor_config.json"):
        file.unlink()
    processor.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Task:
    """A model to serve, requests to it, and how: what `in_vllm.py` reads."""

    model: str
    waves: Waves = ()
    options: dict[str, Any] = field(default_factory=dict)
    all_rows: bool = False
    new_tokens: int = NEW_TOKENS


def served(vllm: tuple[str, dict[str, str]], tasks: Sequence[Task]) -> list[Any]:
    """What vLLM answers, or how it refuses."""
    given = [asdict(task) | {"options": SERVED | task.options} for task in tasks]
    python, environment = vllm
    ran = subprocess.run(
        [python, str(Path(__file__).with_name("in_vllm.py"))],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    results = [
        json.loads(line.removeprefix("RESULT ")) for line in ran.stdout.splitlines() if line.startswith("RESULT ")
    ]
    assert len(results) == len(tasks), ran.stderr[-6000:]
    return results


def requests_of(family: str, folder: Path) -> list[list[Request]]:
    """Prompts with three, one and no picture together; then one that shares its beginning with the first."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    files = []
    for number in range(5):
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(files[-1])
    picture = PICTURES[family]
    beginning = f"USER: yes no {picture} what shape is green? {picture} is there a red circle in the image?"
    many = Request(f"{beginning} {picture} triangle ASSISTANT:", (files[0], files[1], files[2]))
    return [
        [many, Request(f"{picture} is there a triangle?", (files[3],)), Request("USER: yes no blue?", ())],
        [Request(f"{beginning} {picture} blue ASSISTANT:", (files[0], files[1], files[4]))],
    ]


def reference(model: Any, processor: Any, request: Request) -> tuple[list[int], torch.Tensor]:
    """Tokens and log-probabilities, ``[tokens, vocabulary]``, that transformers gives."""
    images = [Image.open(path).convert("RGB") for path in request.images] or None
    inputs = processor(text=request.prompt, images=images, return_tensors="pt")
    given = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, given:].tolist(), torch.stack(out.logits)[:, 0].log_softmax(-1)


@contextmanager
def zeroed(model: nn.Module, attention: Sequence[int], mlp: Sequence[int]) -> Iterator[None]:
    """Have the attention, or the MLP, of some layers give zeros."""
    layers = model.get_submodule("model.language_model.layers")
    handles = [
        layers[number].self_attn.o_proj.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        for number in attention
    ] + [
        layers[number].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        for number in mlp
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def largest_difference(found: Any, right: Sequence[tuple[list[int], torch.Tensor]]) -> float:
    """The largest difference of a log-probability; the tokens must be the same ones."""
    assert "error" not in found, found["error"]
    differences = []
    for answer, (tokens, logprobs) in zip(found["answers"], right, strict=True):
        assert answer["tokens"] == tokens
        own = torch.tensor(answer["logprobs"])
        differences.append(float((own - logprobs[:, : own.shape[1]]).abs().max()))
    print(f"largest difference of a log-probability: {max(differences):.1e}", file=sys.stderr)
    return max(differences)


def loaded(directory: Path) -> tuple[Any, Any]:
    found = load_model(ModelSource(str(directory), device="cpu"))
    return found.model, found.processor


def exported(dense: Path, plan: str, output: Path) -> str:
    return str(export_plan(document(plan, dense), ModelSource(str(dense)), "runtime", output).directory)


ATTENTION, MLP = (0, 2, 4), (1, 4)
"""Layers without the one or the other: the first, which has no residual yet, and one that is left out whole."""
PLANS = {
    "frozen": "RFFRSF",
    "frozen from the first layer on": "FRFFFR",
    "frozen, all rows as queries": "RFFRSF",
    "bypassed": "BRBFRB",
    "without parts": "ARMRSA",
    "without parts for vision tokens": "QPRSPQ",
    "without parts for vision tokens, all rows as queries": "QPRSPQ",
    "all actions": "QAFPBM",
    "given as an option": "SFRSFR",
}


def described(dense: Path | str, output: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of a checkpoint with a changed ``config.json``."""
    shutil.copytree(dense, output)
    config = json.loads((output / "config.json").read_text())
    change(config)
    (output / "config.json").write_text(json.dumps(config))
    return str(output)


def per_layer_config(config: dict[str, Any]) -> None:
    """The field of transformers."""
    config["text_config"]["per_layer_config"] = {
        str(layer): {"skip": ["attention"] * (layer in ATTENTION) + ["mlp"] * (layer in MLP)}
        for layer in sorted({*ATTENTION, *MLP})
    }


def block_configs(config: dict[str, Any]) -> None:
    """The field of NVIDIA's models."""
    config["block_configs"] = [
        {"attention": {"no_op": layer in ATTENTION}, "ffn": {"no_op": layer in MLP}} for layer in range(LAYERS)
    ]


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    """A change of fields of ``config.json``."""
    return lambda config: config.update(values)


@dataclass(frozen=True)
class Case:
    family: str
    dense: Path
    waves: Waves
    results: dict[str, Any]


@pytest.fixture(scope="module", params=list(PICTURES))
def case(
    request: pytest.FixtureRequest, vllm: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """One family under all plans: vLLM is started once, and loads one model behind the other."""
    family = str(request.param)
    folder = tmp_path_factory.mktemp(family)
    dense = build(family, folder / "dense")
    waves = requests_of(family, folder / "pictures")
    overrides = {"hf_overrides": {"skip_plan": PLANS["given as an option"]}}
    tasks = {
        "dense": Task(str(dense), waves),
        "frozen": Task(exported(dense, "RFFRSF", folder / "frozen"), waves, CHUNKED),
        "frozen from the first layer on": Task(exported(dense, "FRFFFR", folder / "first"), waves, CHUNKED),
        "frozen, all rows as queries": Task(str(folder / "frozen"), waves, CHUNKED, all_rows=True),
        "bypassed": Task(
            exported(dense, "BRBFRB", folder / "bypassed"), waves, CHUNKED | {"enable_prefix_caching": False}
        ),
        "without parts": Task(exported(dense, "ARMRSA", folder / "parts"), waves, CHUNKED),
        "without parts for vision tokens": Task(exported(dense, "QPRSPQ", folder / "vision parts"), waves, CHUNKED),
        "without parts for vision tokens, all rows as queries": Task(
            str(folder / "vision parts"), waves, CHUNKED, all_rows=True
        ),
        "all actions": Task(
            exported(dense, "QAFPBM", folder / "all"), waves, CHUNKED | {"enable_prefix_caching": False}
        ),
        "given as an option": Task(str(dense), waves, CHUNKED | overrides),
        "per_layer_config": Task(described(dense, folder / "per_layer", per_layer_config), waves, CHUNKED),
        "block_configs": Task(described(dense, folder / "blocks", block_configs), waves, CHUNKED),
    }
    results = served(vllm, list(tasks.values()))
    return Case(family, dense, waves, dict(zip(tasks, results, strict=True)))


def expected(case: Case, changed: Callable[[Any], AbstractContextManager[Any]]) -> list[tuple[list[int], torch.Tensor]]:
    model, processor = loaded(case.dense)
    with changed(model):
        return [reference(model, processor, request) for wave in case.waves for request in wave]


@pytest.mark.parametrize("name", PLANS)
def test_frozen_and_bypassed_layers_answer_as_the_runtime_does(case: Case, name: str):
    found = case.results[name]
    right = expected(case, lambda model: apply(model, SkipPlan.parse(PLANS[name])))
    assert largest_difference(found, right) < BOUND
    # The last prompt begins as the first one does, for one whole block of the cache at least.
    assert [answer["cached_tokens"] for answer in found["answers"]] == [0, 0, 0, 0 if "B" in PLANS[name] else BLOCK]
    dense = torch.tensor(case.results["dense"]["answers"][0]["logprobs"])
    assert (dense[0] - right[0][1][0, : dense.shape[1]]).abs().max() > 100 * BOUND  # the plan changes the answers


@pytest.mark.parametrize("name", ["per_layer_config", "block_configs"])
def test_layers_without_attention_or_mlp_answer_as_if_those_gave_zeros(case: Case, name: str):
    found = case.results[name]
    assert largest_difference(found, expected(case, lambda model: zeroed(model, ATTENTION, MLP))) < BOUND


def test_a_cache_of_given_size_holds_more_tokens_where_attention_is_skipped(case: Case):
    layer_bytes = 2 * 2 * 32 * 4 * BLOCK  # keys and values of two heads of 32 numbers of four bytes, for each token
    blocks = {name: result["blocks"] for name, result in case.results.items()}
    assert blocks["dense"] == CACHE_BYTES // (layer_bytes * LAYERS)
    assert blocks["per_layer_config"] == blocks["block_configs"] == CACHE_BYTES // (layer_bytes * (LAYERS - 3))


def test_the_dense_model_is_served_as_without_the_plug_in(case: Case):
    assert largest_difference(case.results["dense"], expected(case, lambda model: nullcontext())) < BOUND


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(vllm: tuple[str, dict[str, str]], tmp_path: Path):
    dense = build("llava", tmp_path / "dense")
    frozen = exported(dense, "RFFRRR", tmp_path / "frozen")
    bypassed = exported(dense, "RBRRRR", tmp_path / "bypassed")
    smolvlm = tiny_video_families.save(tmp_path / "smolvlm", "smolvlm", sizes=SIZES)
    refused = {
        "layer 1 is frozen: .* add --enforce-eager": Task(frozen, options={"enforce_eager": False}),
        "layer 1 is bypassed: .* add --no-enable-prefix-caching": Task(bypassed),
        "not served with --pipeline-parallel-size": Task(frozen, options={"pipeline_parallel_size": 2}),
        "not served by vLLM's Transformers.*; leave out --model-impl": Task(
            frozen, options={"model_impl": "transformers"}
        ),
        "is for 5 layers and the model has 6: it is another model's": Task(
            str(dense), options={"hf_overrides": {"skip_plan": "RFFRR"}}
        ),
        "layer 2: 'X' is none of R, F, B, S": Task(
            described(frozen, tmp_path / "bad", changed(skip_plan="RFXRRR")),
        ),
        "served for llava, qwen2_vl, qwen2_5_vl, internvl, not for gemma3": Task(
            described(frozen, tmp_path / "gemma3", changed(model_type="skipplan_gemma3"))
        ),
        "served for llava, .*, not for SmolVLMForConditionalGeneration": Task(
            described(smolvlm, tmp_path / "skipping", per_layer_config)
        ),
    }
    results = served(vllm, list(refused.values()))
    for reason, result in zip(refused, results, strict=True):
        line = next((line for line in result["error"].splitlines() if "skipplan: " in line), result["error"])
        assert re.search(reason, line), result["error"]
