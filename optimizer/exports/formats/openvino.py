"""Format ``openvino``: the checkpoint without the skipped layers, exported through optimum-intel.

optimum-intel pins a version of transformers of its own (2.2 wants one below 5.6), so it usually lives in another
environment, whose interpreter is named in ``SKIPPLAN_OPENVINO_PYTHON``. A version that knows some tensors by other
names than the hub's, which the checkpoint has, would fill them with random numbers and go on: so the names are checked
there first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from optimizer.exports.formats import checkpoint
from optimizer.exports.interface import (
    ExportFault,
    ExportFormat,
    Guide,
    Loadable,
    Subject,
    needs_plain_skips,
)
from workers.engines.process import find_program
from workers.text import last_line

PYTHON_VARIABLE = "SKIPPLAN_OPENVINO_PYTHON"
PROBE = "import optimum.intel, importlib.metadata as m; print(m.version('optimum-intel'), m.version('openvino'))"
REPORT_NAMES = (
    "import json, sys; from transformers import AutoModelForImageTextToText as A; "
    "report = A.from_pretrained(sys.argv[1], output_loading_info=True)[1]; "
    "json.dump({kind: sorted(map(str, report[kind])) for kind in ('missing_keys', 'unexpected_keys')}, "
    "open(sys.argv[2], 'w'))"
)
INSTALL = (
    "install it into an environment of its own (pip install 'optimum-intel[openvino]') and name that environment's "
    f"python in {PYTHON_VARIABLE}"
)


def interpreter() -> str:
    """Return the Python that has optimum-intel. Raises ExportFault saying how to get it when there is none."""
    python = find_program(sys.executable, PYTHON_VARIABLE) or sys.executable
    done = _run([python, "-I", "-c", PROBE])
    if done.returncode:
        raise ExportFault(f"--format: openvino needs optimum-intel, which {python} cannot import; {INSTALL}")
    return python


def write(subject: Subject, directory: Path) -> None:
    """Write the pruned checkpoint to a scratch directory and have optimum-intel export it."""
    python = interpreter()
    with tempfile.TemporaryDirectory(prefix="skipplan-openvino-", dir=directory.parent) as scratch:
        pruned = Path(scratch) / "checkpoint"
        checkpoint.write(subject, pruned)
        require_known_names(python, pruned)
        entry = "from optimum.commands.optimum_cli import main; main()"
        task = ["--task", "image-text-to-text", "--weight-format", "fp32"]
        done = _run([python, "-I", "-c", entry, "export", "openvino", "--model", str(pruned), *task, str(directory)])
    if done.returncode or not (directory / "openvino_language_model.xml").is_file():
        raise ExportFault(f"--format: openvino: optimum-intel failed: {last_line(done.stderr, 'no message')}")


def require_known_names(python: str, directory: Path) -> None:
    """Raise ExportFault when the transformers of that Python knows tensors of the checkpoint by other names."""
    report = _loading_report(python, directory)
    if any(report.values()):
        example = next(name for names in report.values() for name in names)
        raise ExportFault(
            f"--format: openvino: the transformers that optimum-intel uses names this model's weights otherwise (for "
            f"example {example}), so they would be left random; use format checkpoint"
        )


def _loading_report(python: str, directory: Path) -> dict[str, list[str]]:
    """Which weights that Python's transformers finds missing from the checkpoint or does not know."""
    file = directory.with_name("loading-report.json")
    done = _run([python, "-I", "-c", REPORT_NAMES, str(directory), str(file)])
    if done.returncode:
        raise ExportFault(
            f"--format: openvino: the checkpoint does not load there: {last_line(done.stderr, 'no message')}"
        )
    report: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return report


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)


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


def loadable(directory: Path, scratch: Path, python: str) -> Loadable:
    """Load the directory with optimum-intel in the environment that has it."""
    return Loadable(directory, "openvino", interpreter())


def check() -> Sequence[str]:
    """Which optimum-intel would be used."""
    done = _run([find_program(sys.executable, PYTHON_VARIABLE) or sys.executable, "-I", "-c", PROBE])
    if done.returncode:
        return ("optimum-intel is not installed here: the export was not run",)
    optimum, runtime = done.stdout.split()
    return (f"exported by optimum-intel {optimum} with OpenVINO {runtime}",)


FORMAT = ExportFormat(
    name="openvino",
    summary="OpenVINO files through optimum-intel, for CPUs",
    needs_model=True,
    refusal=needs_plain_skips,
    write=write,
    guide=guide,
    loadable=loadable,
    check=check,
    lossless=False,
)
