"""Format ``llama-cpp``: the checkpoint without the skipped layers, with the commands that convert and serve it.

llama.cpp's own ``llama-quantize --prune-layers`` is not used: it takes layers out of original weights, which hold no
maps of compensated gaps, and leaves metadata with an entry for each layer at its old length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from optimizer.exports.formats import checkpoint
from optimizer.exports.interface import ExportFormat, Guide, Subject, needs_plain_skips
from workers.engines.interface import ENGINES
from workers.errors import EngineAbsent

SCRIPT = "convert.sh"
COMMANDS = f"""#!/bin/sh
# Usage: LLAMA_CPP=path/to/llama.cpp ./{SCRIPT} OUTPUT [TYPE]
# Writes OUTPUT/model.gguf and OUTPUT/mmproj.gguf (the vision tower) in 16 bits; with TYPE, such as Q8_0, the language
# model quantised by llama-quantize, which QUANTIZE names where it is not on the PATH.
set -e
here=$(dirname "$0")
llama_cpp=${{LLAMA_CPP:?set LLAMA_CPP to the directory of llama.cpp, which holds convert_hf_to_gguf.py}}
quantize=${{QUANTIZE:-llama-quantize}}
python=${{PYTHON:-python3}}
output=${{1:?name an output directory}}
type=$2
if test -n "$type"; then
    command -v "$quantize" > /dev/null || {{ echo "$quantize was not found: install llama.cpp" >&2; exit 1; }}
fi
mkdir -p "$output"
"$python" "$llama_cpp/convert_hf_to_gguf.py" "$here" --outfile "$output/model.gguf"
"$python" "$llama_cpp/convert_hf_to_gguf.py" "$here" --mmproj --outfile "$output/mmproj.gguf"
if test -n "$type"; then
    "$quantize" "$output/model.gguf" "$output/quantised.gguf" "$type"
    mv "$output/quantised.gguf" "$output/model.gguf"
fi
"""
CLIP_TOWER = (
    "This model's vision tower is a CLIP one. llama.cpp's converter does not take it, so the commands end behind "
    "`model.gguf`; with an `mmproj.gguf` from elsewhere its server misplaces patches, as it does the dense model's: "
    "it puts the class token behind them and takes it for the last one (its issue 25814). Serve it in another engine.",
)


def write(subject: Subject, directory: Path) -> None:
    """Write the checkpoint and the commands."""
    checkpoint.write_for_engine(subject, directory)
    script = directory / SCRIPT
    script.write_text(COMMANDS, encoding="utf-8")
    script.chmod(0o755)


def guide(subject: Subject, directory: Path) -> Guide:
    """How it is converted and served."""
    return Guide(
        usage=f"```sh\nLLAMA_CPP=path/to/llama.cpp ./{SCRIPT} gguf Q8_0\n"
        "llama-server --model gguf/model.gguf --mmproj gguf/mmproj.gguf\n```",
        limits=(
            "llama.cpp's converter must know the family, its tokenizer and its vision tower.",
            "The vision tower and projector (`mmproj.gguf`) are not changed by the plan.",
            "Accuracy and speed-up above hold for the unquantised model in transformers.",
            *(CLIP_TOWER if vision_tower(directory) == "clip_vision_model" else ()),
        ),
    )


def vision_tower(directory: Path) -> object:
    """Return the family of the checkpoint's vision tower, if it has one."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return (config.get("vision_config") or {}).get("model_type")


def check() -> Sequence[str]:
    """Which llama.cpp would serve it."""
    try:
        found = ENGINES["llama.cpp"].installed()
    except EngineAbsent as error:
        return (f"it was not served: {error}",)
    return (f"llama.cpp {found.version} is here: verify-export converts and serves it there",)


FORMAT = ExportFormat(
    name="llama-cpp",
    summary="the checkpoint with the commands that convert it for llama.cpp",
    needs_model=True,
    refusal=needs_plain_skips,
    write=write,
    guide=guide,
    loadable=checkpoint.loadable,
    engine="llama.cpp",
    check=check,
)
