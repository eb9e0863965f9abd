"""Format ``llama-cpp``: the commands that convert and prune the model with llama.cpp's own tools.

``llama-quantize --prune-layers`` takes layers out of a converted model. It renumbers the tensors but leaves metadata
that has an entry for each layer at its old length (llama.cpp issue 27976), so a model with such lists is to be
converted from the pruned checkpoint instead.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimizer.exports.interface import (
    ExportFault,
    ExportFormat,
    Guide,
    Subject,
    find_program,
    needs_plain_skips,
)
from workers.messages import NO_COMPENSATION
from workers.runtime import SkipPlan

SCRIPT = "prune.sh"
PROGRAM = "llama-quantize"
PROGRAM_VARIABLE = "SKIPPLAN_LLAMA_QUANTIZE"
OPTION = "--prune-layers"


def refusal(plan: SkipPlan, compensation: str) -> str | None:
    """Refuse what ``--prune-layers`` cannot say."""
    reason = needs_plain_skips(plan, compensation)
    if reason is None and compensation != NO_COMPENSATION:
        reason = (
            f"its gaps are compensated ({compensation}), and the tool leaves layers out of the original weights, "
            "which have no maps in them"
        )
    if reason is None and not plan.removed:
        reason = "it skips no layer, so there is nothing to prune"
    return reason


def write(subject: Subject, directory: Path) -> None:
    """Write the commands. Raises ExportFault for models whose metadata the tool would leave wrong."""
    from workers.models.checkpoint import read_config

    assert subject.checkpoint is not None
    lists = per_layer_lists(read_config(subject.checkpoint), len(subject.plan))
    if lists:
        raise ExportFault(
            f"--format: llama-cpp cannot prune a {subject.document.model.family} model: its configuration has an entry "
            f"for each layer ({', '.join(lists)}), which {PROGRAM} leaves at the old length; export format checkpoint "
            "and convert that"
        )
    script = directory / SCRIPT
    script.write_text(commands(subject.plan, str(subject.checkpoint.resolve())), encoding="utf-8")
    script.chmod(0o755)


def per_layer_lists(config: dict[str, Any], num_layers: int) -> list[str]:
    """Names of lists in the text part of a configuration that may have an entry for each layer."""
    text = config.get("text_config", config)
    return sorted(name for name, value in text.items() if isinstance(value, list) and len(value) == num_layers)


def commands(plan: SkipPlan, checkpoint: str) -> str:
    """Return the script: check the tool, convert language model and vision tower, prune."""
    layers = ",".join(map(str, plan.removed))
    convert = '"$python" "$llama_cpp/convert_hf_to_gguf.py"'
    source = shlex.quote(checkpoint)
    return f"""#!/bin/sh
# Usage: LLAMA_CPP=path/to/llama.cpp ./{SCRIPT} OUTPUT [TYPE]
# {PROGRAM_VARIABLE} names {PROGRAM} where it is not on the PATH; TYPE is COPY (no quantisation) unless given.
set -e
llama_cpp=${{LLAMA_CPP:?set LLAMA_CPP to the directory of llama.cpp, which holds convert_hf_to_gguf.py}}
quantize=${{{PROGRAM_VARIABLE}:-{PROGRAM}}}
python=${{PYTHON:-python3}}
output=${{1:?name an output directory}}
type=${{2:-COPY}}
command -v "$quantize" > /dev/null || {{ echo "$quantize was not found: install llama.cpp" >&2; exit 1; }}
"$quantize" --help 2>&1 | grep -q -e "{OPTION}" || {{
    echo "this $quantize does not know {OPTION}: update llama.cpp (release b5740 or later)" >&2; exit 1; }}
mkdir -p "$output"
{convert} {source} --outtype bf16 --outfile "$output/dense.gguf"
{convert} {source} --mmproj --outtype bf16 --outfile "$output/mmproj.gguf"
"$quantize" {OPTION} {layers} "$output/dense.gguf" "$output/pruned.gguf" "$type"
"""


def guide(subject: Subject, directory: Path) -> Guide:
    """How the commands are run."""
    layers = ",".join(map(str, subject.plan.removed))
    return Guide(
        usage=f"```sh\nLLAMA_CPP=path/to/llama.cpp ./{SCRIPT} gguf Q8_0\n"
        "llama-mtmd-cli -m gguf/pruned.gguf --mmproj gguf/mmproj.gguf --image picture.png -p 'your question'\n```\n\n"
        f"The pruning itself is `{PROGRAM} {OPTION} {layers} dense.gguf pruned.gguf TYPE`.",
        limits=(
            f"`{PROGRAM}` must know `{OPTION}` (release b5740 or later); the script checks.",
            "llama.cpp's converter must know the family, its tokenizer and its vision tower.",
            "The vision tower and projector (`mmproj.gguf`) are not changed by the plan.",
            "Accuracy and speed-up above hold for the unquantised model in transformers.",
        ),
    )


def check() -> Sequence[str]:
    """Whether llama.cpp is here and knows the option."""
    program = find_program(PROGRAM, PROGRAM_VARIABLE)
    if program is None:
        return (f"llama.cpp is not installed here ({PROGRAM} was not found): the commands were not run",)
    if not knows_option(program, OPTION):
        return (f"{program} does not know {OPTION}: update llama.cpp (release b5740 or later)",)
    return (f"{program} knows {OPTION}",)


def knows_option(program: str, option: str) -> bool:
    """Whether the program's help speaks of the option. Raises ExportFault when it cannot be run."""
    try:
        done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportFault(f"{program} cannot be run: {error}") from None
    return option in done.stdout + done.stderr


FORMAT = ExportFormat(
    name="llama-cpp",
    summary="the commands that convert and prune the model with llama.cpp",
    needs="files",
    refusal=refusal,
    write=write,
    guide=guide,
    check=check,
)
