"""Format ``openvino``: the checkpoint without the skipped layers, exported through optimum-intel."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from optimizer.exports.formats import checkpoint
from optimizer.exports.interface import (
    ExportFault,
    ExportFormat,
    Guide,
    Subject,
    needs_plain_skips,
)
from workers.engines.interface import ENGINES
from workers.engines.openvino import convert
from workers.errors import EngineError


def interpreter() -> str:
    """Return the Python that has optimum-intel. Raises ExportFault saying how to get it when there is none."""
    try:
        return ENGINES["openvino"].installed().program
    except EngineError as error:
        raise ExportFault(f"--format: openvino: {error}") from None


def write(subject: Subject, directory: Path) -> None:
    """Write the pruned checkpoint to a scratch directory and have optimum-intel export it."""
    python = interpreter()
    with tempfile.TemporaryDirectory(prefix="skipplan-openvino-", dir=directory.parent) as scratch:
        pruned = Path(scratch) / "checkpoint"
        checkpoint.write(subject, pruned)
        try:
            convert(python, pruned, directory)
        except EngineError as error:
            raise ExportFault(f"--format: openvino: {error}") from None


def guide(subject: Subject, directory: Path) -> Guide:
    """How the model is run."""
    return Guide(
        usage="```python\n"
        "from optimum.intel import OVModelForVisualCausalLM\n"
        "from transformers import AutoProcessor\n\n"
        f'model = OVModelForVisualCausalLM.from_pretrained("{directory.name}")\n'
        f'processor = AutoProcessor.from_pretrained("{directory.name}")\n'
        "```",
        limits=(
            "Weights are stored in float32, so that answers are those of the model; quantise with optimum-intel "
            "afterwards if you accept other answers.",
            "OpenVINO computes on its own kernels: logits agree to rounding, not bit for bit.",
            "optimum-intel must know the family.",
        ),
    )


def check() -> Sequence[str]:
    """Which optimum-intel would be used."""
    try:
        found = ENGINES["openvino"].installed()
    except EngineError:
        return ("optimum-intel is not installed here: the export was not run",)
    return (f"exported by optimum-intel {found.versions['optimum-intel']} with OpenVINO {found.version}",)


FORMAT = ExportFormat(
    name="openvino",
    summary="OpenVINO files through optimum-intel, for CPUs",
    needs_model=True,
    refusal=needs_plain_skips,
    write=write,
    guide=guide,
    engine="openvino",
    check=check,
)
