"""Format ``mergekit``: a passthrough configuration that mergekit turns into the checkpoint.

mergekit (0.1.5) has no definition of most vision-language architectures and infers one from the names that the
weights have in memory: a module for each list of layers and one for the rest. Weights that are stored under other names
it treats as optional and leaves out without a word, so such a model is exported under its names in memory
beside the configuration. mergekit does not change the number of layers in ``config.json`` of an inferred architecture
either, and copies no processor; both lie in ``checkpoint-files``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from optimizer.exports.formats import ExportFault, ExportFormat, Guide, Loadable, Subject, needs_plain_skips
from optimizer.exports.tools import find_program, installation_notes
from workers.runtime import SkipPlan

CONFIGURATION = "mergekit.yml"
SCRIPT = "merge.sh"
FILES = "checkpoint-files"
SOURCE = "./source"
PROGRAM_VARIABLE = "SKIPPLAN_MERGEKIT"
DEFAULT_MODULE = "default"
LAYER_NUMBER = re.compile(r"\.\d+\.")

DEFINED = frozenset(
    {
        "Gemma3ForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    }
)
"""Architectures that mergekit defines itself, by modules and tensor names of its own."""


def write(subject: Subject, directory: Path) -> None:
    """Write the configuration, the files that mergekit does not make, and the model where mergekit needs it renamed."""
    from workers.models.checkpoint import find_checkpoint, weight_files
    from workers.runtime import apply, describe
    from workers.runtime.folding import folded
    from workers.runtime.locate import locate

    model = subject.model.model
    architecture = type(model).__name__
    if architecture in DEFINED:
        raise ExportFault(
            f"--format: mergekit defines {architecture} itself, with modules and tensor names that are not the "
            "model's, so that equal tensors are not assured; use format checkpoint"
        )
    files = directory / FILES
    files.mkdir()
    with apply(model, subject.plan):  # while it is applied, the configuration is that of the remaining layers
        model.config.save_pretrained(files)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(files)
    subject.model.processor.save_pretrained(files)
    names = list(model.state_dict())
    stored = stored_names(weight_files(find_checkpoint(subject.source)))
    if stored == set(names) and not subject.maps:
        source = str(find_checkpoint(subject.source).resolve())
    else:
        source = SOURCE
        with folded(locate(model), subject.plan, subject.maps) if subject.maps else nullcontext():
            model.save_pretrained(directory / SOURCE, save_original_format=False)
    configuration = passthrough(subject.plan, source, describe(model).stack_path, names)
    (directory / CONFIGURATION).write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    script = directory / SCRIPT
    script.write_text(_script(), encoding="utf-8")
    script.chmod(0o755)


def passthrough(plan: SkipPlan, source: str, stack_path: str, names: Iterable[str]) -> dict[str, Any]:
    """The configuration: the decoder's kept layers in runs, every other module whole.

    ``names`` are the names of the weights in memory; mergekit names an inferred module by what stands before the
    first layer number.
    """
    found = {name: LAYER_NUMBER.search(name) for name in names}
    modules = sorted({name[: match.start()] for name, match in found.items() if match})
    whole = {"models": [{"model": source}]}
    slices = [{"sources": [{"model": source, "layer_range": [start, end]}]} for start, end in runs(plan.kept)]
    if len(modules) == 1:  # mergekit then puts everything into one module
        return {"merge_method": "passthrough", "slices": slices}
    described: dict[str, Any] = {name: {"slices": slices} if name == stack_path else whole for name in modules}
    return {"merge_method": "passthrough", "modules": described | {DEFAULT_MODULE: whole}}


def runs(kept: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive layers, each from its first layer to the one after its last."""
    grouped = groupby(enumerate(kept), key=lambda entry: entry[1] - entry[0])
    found = [[layer for _, layer in group] for _, group in grouped]
    return [(run[0], run[-1] + 1) for run in found]


def stored_names(files: Iterable[Path]) -> set[str]:
    """The names of the tensors in safetensors files."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    return names


def _script() -> str:
    return (
        "#!/bin/sh\n# Usage: ./merge.sh OUTPUT. SKIPPLAN_MERGEKIT names mergekit-yaml where it is not on the PATH.\n"
        "set -e\n"
        'output=$(realpath -m "$1")\n'
        'cd "$(dirname "$0")"\n'
        f'"${{{PROGRAM_VARIABLE}:-mergekit-yaml}}" {CONFIGURATION} "$output"\n'
        f'cp {FILES}/* "$output"/\n'
    )


def guide(subject: Subject, directory: Path) -> Guide:
    """How the configuration is run."""
    return Guide(
        usage=f"```sh\npip install mergekit==0.1.5\n./{SCRIPT} merged\n```\n\nwhich is\n\n```sh\n"
        f"mergekit-yaml {CONFIGURATION} merged\ncp {FILES}/* merged/\n```",
        limits=(
            f"`{FILES}/` must be copied over: mergekit keeps the dense number of layers in `config.json` of "
            "architectures that it infers, and copies no processor.",
            f"If there is a `{SOURCE}/`, it is the dense model with its tensors named as in memory. mergekit 0.1.5 "
            "does not resolve this family's stored names and would leave the tensors out without an error. "
            "Where gaps are compensated, the maps are in its weights.",
        ),
    )


def loadable(directory: Path, scratch: Path, python: str) -> Loadable:
    """What mergekit makes of the configuration."""
    program = find_program("mergekit-yaml", PROGRAM_VARIABLE)
    if program is None:
        raise ExportFault(
            "mergekit is not installed here, so its configuration cannot be run: pip install mergekit==0.1.5 into an "
            f"environment of its own and name its mergekit-yaml in {PROGRAM_VARIABLE}"
        )
    merged = scratch / "merged"
    environment = os.environ | {PROGRAM_VARIABLE: program, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["sh", str((directory / SCRIPT).resolve()), str(merged)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(merged, ignore_errors=True)
        raise ExportFault(f"mergekit failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Loadable(merged, "transformers", python)


def check() -> Sequence[str]:
    """Whether mergekit is here."""
    return installation_notes("mergekit-yaml", PROGRAM_VARIABLE)


FORMAT = ExportFormat(
    name="mergekit",
    summary="a passthrough configuration for mergekit",
    needs="model",
    refusal=needs_plain_skips,
    write=write,
    guide=guide,
    loadable=loadable,
    check=check,
)
