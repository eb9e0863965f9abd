"""Format ``drafter``: the checkpoint without the skipped layers, to draft for the dense model in other programs.

A plan of skips, compensated or not, is a smaller model of the same vocabulary that reads the same image features, which
is what programs with speculative decoding take as a draft model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from optimizer.exports.formats import checkpoint, llama_cpp
from optimizer.exports.interface import ExportFault, ExportFormat, Guide, Loadable, Subject, needs_plain_skips
from storage.pareto import STANDALONE
from storage.records.plans import LOSSLESS

LOADER = Path(__file__).with_name("drafter_loader.py")
CODE = "drafter.py"
DRAFT_LENGTH = 3
"""Tokens drafted at a time in the commands."""

NO_PLUGIN = (
    "vLLM 0.32 without the plug-in fails at the first request with an image: `IndexError: The shape of the mask ... "
    "does not match the shape of the indexed tensor`."
)
NO_MROPE = (
    "vLLM 0.32 does not start with it: `Speculative Decoding with draft models or parallel drafting does not support "
    "M-RoPE yet`."
)
OTHER_FAMILY = (
    "In vLLM 0.32 the plug-in mends draft models of LLaVA and InternVL alone; SmolVLM, for one, does not start: "
    "`AttributeError: 'SmolVLMConfig' object has no attribute 'image_token_index'`."
)
VLLM_LIMITS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("llava", "internvl"), NO_PLUGIN)
    | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), NO_MROPE)
)
"""By ``model_type``: how vLLM fails."""


def write(subject: Subject, directory: Path) -> None:
    """Write the checkpoint as engines read it, and the module that transformers loads it with."""
    checkpoint.write_for_engine(subject, directory)
    shutil.copyfile(LOADER, directory / CODE)


def guide(subject: Subject, directory: Path) -> Guide:
    """How the drafter is used in each program, beside the dense model."""
    name, family = directory.name, subject.document.model.family
    dense = subject.document.model.name.replace("`", "")
    drafting = subject.document.mode == LOSSLESS
    measured = "drafting in skipplan's own runtime" if drafting else "the plan alone, in the dense model's place"
    return Guide(
        usage=f"It drafts for the dense model, `{dense}` below, which decides every token: answers are the dense "
        f"model's. The figures above are of {measured}.\n\n"
        "In transformers (batches of one, as its assisted generation has them):\n\n```python\n"
        f'import sys; sys.path.insert(0, "{name}")\n'
        f"from {CODE.removesuffix('.py')} import load_drafter\n"
        "from transformers import AutoModelForImageTextToText\n\n"
        f'dense = AutoModelForImageTextToText.from_pretrained("{dense}")\n'
        "answer = dense.generate(**inputs, assistant_model=load_drafter())\n```\n\n"
        "In vLLM, with the plug-in `skipplan-vllm` in its environment:\n\n```sh\n"
        f"vllm serve {dense} --speculative-config '{speculative_config(name)}'\n```\n\n"
        f"In llama.cpp, of which `dense/` holds the dense model's files:\n\n```sh\n"
        f"python llama.cpp/convert_hf_to_gguf.py {name} --outfile drafter.gguf\n"
        f"llama-server --model dense/model.gguf --mmproj dense/mmproj.gguf --model-draft drafter.gguf "
        f"--spec-type draft-simple --spec-draft-n-max {DRAFT_LENGTH}\n```",
        limits=(
            f"Loaded without `{CODE}`, transformers drafts without the images: answers are the same, most drafts are "
            "refused.",
            VLLM_LIMITS.get(family, OTHER_FAMILY),
            *(llama_cpp.CLIP_TOWER if llama_cpp.vision_tower(directory) == "clip_vision_model" else ()),
            "Weights, vision tower included, are held a second time; the runtime's `speculate` shares the dense "
            "model's.",
        ),
    )


def speculative_config(location: str) -> str:
    """Return vLLM's option for the drafter at ``location``."""
    return json.dumps({"method": "draft_model", "model": location, "num_speculative_tokens": DRAFT_LENGTH})


def loadable(directory: Path, scratch: Path, python: str) -> Loadable:
    """Load it as the dense model's assistant by the directory's own code, if that code is ours."""
    if (directory / CODE).read_bytes() != LOADER.read_bytes():
        raise ExportFault(
            f"{directory / CODE} is not what this version of skipplan writes, so it is not run; export again, or "
            "verify with the version that wrote it"
        )
    return Loadable(directory, "drafter", python)


FORMAT = ExportFormat(
    name="drafter",
    summary="the checkpoint without the skipped layers, to draft for the dense model",
    needs_model=True,
    refusal=needs_plain_skips,
    write=write,
    guide=guide,
    loadable=loadable,
    drafts=frozenset({STANDALONE, LOSSLESS}),
)
