"""Format ``vllm``: the checkpoint without the skipped layers, with the command that serves it.

What a plain checkpoint cannot hold is named by ``skip_plan`` of ``config.json``, for the plug-in ``skipplan-vllm``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from optimizer.exports.formats import checkpoint
from optimizer.exports.interface import ExportFault, ExportFormat, Guide, Loadable, Subject, plan_in, takes_everything
from workers.engines.interface import ENGINES
from workers.engines.vllm_plugin.register import ARCHITECTURES
from workers.errors import EngineAbsent
from workers.runtime import Action

SCRIPT = "serve.sh"

PLAIN_LIMITS = (
    "A pruned checkpoint needs nothing beyond what the dense one needs.",
    "Tensor parallelism is not affected; pipeline parallelism splits the remaining layers.",
)
CODED_LIMITS = (
    "vLLM needs the plug-in `skipplan-vllm` in its environment; without it neither vLLM nor transformers loads the "
    "directory, since they would run every layer that is left for every token.",
    "The plug-in refuses what was not tried with such plans, pipeline parallelism and LoRA among it, by one line.",
)
IMAGE_TOKENS = (
    "Image tokens see one another. vLLM's attention for CPUs has no such mask and lets them see earlier ones alone: on "
    "a CPU answers about images differ, those of the dense model too. Requests without images are answered the same.",
)
DEEPSTACK = ("The first layers take vision features of their own (deepstack), so no plan skips them.",)
FAMILY_LIMITS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "mllama": ("vLLM dropped this family with its first engine; versions that still serve it are old.",),
        "gemma3": IMAGE_TOKENS,
        "gemma3n": ("Layers that share keys and values are counted in `config.json`, which the export adapts.",),
        "gemma4": ("Layers that share keys and values are counted in `config.json`, which the export adapts.",),
        "qwen3_vl": DEEPSTACK,
        "qwen3_vl_moe": DEEPSTACK,
    }
)
"""By ``model_type``: what is known beyond the general limits."""


def write(subject: Subject, directory: Path) -> None:
    """Write the checkpoint and the serve command."""
    from optimizer.exports.target import inside

    checkpoint.write_for_engine(subject, directory, plain=False)
    family = subject.model.model.config.model_type
    if plan_in(directory) is not None and family not in ARCHITECTURES:
        raise ExportFault(
            f"--format: vllm cannot take plan {subject.plan.text}: it takes code to run, and vLLM's plug-in serves "
            f"such plans of {', '.join(ARCHITECTURES)}, not of {family}; formats that can: plan, runtime"
        )
    script = inside(directory, SCRIPT)
    script.write_text("#!/bin/sh\nset -e\n" + command(directory, '"$(dirname "$0")"') + ' "$@"\n', encoding="utf-8")
    script.chmod(0o755)


def command(directory: Path, location: str) -> str:
    """Return the serve command for the checkpoint in ``directory``, as the shell sees it at ``location``."""
    parts = ["exec", "vllm", "serve", location, "--limit-mm-per-prompt", shlex.quote('{"image": 1}')]
    plan = plan_in(directory)
    if plan is not None and plan.needs_vision_tokens:
        parts.append("--enforce-eager")
    if plan is not None and Action.BYPASS in plan.actions:
        parts.append("--no-enable-prefix-caching")
    if plan is None and (overrides := needed_overrides(directory)):  # the plug-in knows the class of a plan's model
        parts += ["--hf-overrides", shlex.quote(json.dumps(overrides))]
    return " ".join(parts)


def needed_overrides(directory: Path) -> dict[str, object]:
    """Find what ``config.json`` does not tell vLLM.

    vLLM chooses its model class by ``architectures``; configurations of models that were never saved by transformers'
    ``save_pretrained`` may lack it.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("architectures"):
        return {}
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    model_class = AutoModelForImageTextToText._model_mapping[CONFIG_MAPPING[config["model_type"]]]
    return {"architectures": [model_class.__name__]}


def guide(subject: Subject, directory: Path) -> Guide:
    """How the checkpoint is served, with the family's limits."""
    family = subject.document.model.family
    served = any(each.engine == "vllm" for each in subject.document.figures.engine_latencies)
    return Guide(
        usage=f"```sh\n{command(directory, shlex.quote(directory.name)).removeprefix('exec ')}\n```\n\n"
        f"or `./{SCRIPT}`, which passes further options on.",
        limits=(
            *(PLAIN_LIMITS if plan_in(directory) is None else CODED_LIMITS),
            f"vLLM must know the family `{family}`.",
            "A speculative (draft, MTP or EAGLE) head trained on the dense model's states no longer fits.",
            *([] if served else ["The speed-up above was measured in transformers; vLLM's own will differ."]),
            *FAMILY_LIMITS.get(family, ()),
        ),
    )


def loadable(directory: Path, scratch: Path, python: str) -> Loadable:
    """Load the directory with transformers, where it is a plain checkpoint."""
    if plan_in(directory) is not None:
        raise ExportFault(
            f"{directory} is loaded by vLLM with the plug-in skipplan-vllm alone: name the Python that has them in "
            "SKIPPLAN_VLLM_PYTHON, or export with --format runtime for transformers"
        )
    return checkpoint.loadable(directory, scratch, python)


def check() -> Sequence[str]:
    """Which vLLM would serve it."""
    try:
        found = ENGINES["vllm"].installed()
    except EngineAbsent as error:
        return (f"it was not served: {error}",)
    return (f"vLLM {found.version} is here: verify-export serves it there",)


FORMAT = ExportFormat(
    name="vllm",
    summary="the checkpoint with vLLM's serve command",
    needs_model=True,
    refusal=takes_everything,
    write=write,
    guide=guide,
    loadable=loadable,
    engine="vllm",
    check=check,
)
