"""Serve with OpenVINO through optimum-intel, which lives in an environment that ``SKIPPLAN_OPENVINO_PYTHON`` names.

optimum-intel pins a version of transformers of its own (2.2 wants one below 5.6). A version that knows some tensors by
other names than the hub's, which the checkpoint has, would fill them with random numbers and go on: so the names are
checked there first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from workers.engines.client import ChatServer
from workers.engines.interface import Engine, Installed, Server, Serving
from workers.engines.process import LOOPBACK, choose_port, find_program, running
from workers.errors import EngineAbsent, EngineError, EngineLost
from workers.text import last_line

PYTHON_VARIABLE = "SKIPPLAN_OPENVINO_PYTHON"
PROGRAM = Path(__file__).with_name("openvino_server.py")
LANGUAGE_MODEL = "openvino_language_model.xml"
PROBE = (
    "import json, optimum.intel; from importlib.metadata import version; "
    "print(json.dumps({name: version(name) for name in ('openvino', 'optimum-intel', 'transformers')}))"
)
REPORT_NAMES = (
    "import json, sys; from transformers import AutoModelForImageTextToText as A; "
    "report = A.from_pretrained(sys.argv[1], output_loading_info=True)[1]; "
    "json.dump({kind: sorted(map(str, report[kind])) for kind in ('missing_keys', 'unexpected_keys')}, "
    "open(sys.argv[2], 'w'))"
)
EXPORT = "from optimum.commands.optimum_cli import main; main()"


class OpenVino:
    """OpenVINO's kernels behind a server of ours, one request after another."""

    name, export_format = "openvino", "openvino"

    def installed(self) -> Installed:
        """Find the Python that has optimum-intel. Raises EngineError saying how to get it."""
        python = find_program(sys.executable, PYTHON_VARIABLE) or sys.executable
        done = _run([python, "-I", "-c", PROBE])
        if done.returncode:
            kind = EngineError if os.environ.get(PYTHON_VARIABLE) else EngineAbsent
            raise kind(
                f"optimum-intel cannot be imported by {python}; install it into an environment of its own (pip install "
                f"'optimum-intel[openvino]') and name that environment's python in {PYTHON_VARIABLE}"
            )
        versions: dict[str, str] = json.loads(last_line(done.stdout, "{}"))
        return Installed(versions.pop("openvino"), python, versions, devices=("cpu",))

    @contextmanager
    def serve(self, directory: Path, serving: Serving) -> Iterator[Server]:
        """Serve an ``openvino`` export, or a checkpoint that is converted first."""
        if serving.images != 1 or serving.prefix_caching or serving.options or serving.drafter is not None:
            raise EngineError(
                "openvino serves requests with one image, without prefix caching, drafters or further options"
            )
        installed = self.installed()
        port, name = choose_port(serving.port), f"skipplan-{uuid4().hex[:12]}"
        dtype = "float32" if serving.dtype == "auto" else serving.dtype
        with tempfile.TemporaryDirectory(prefix="skipplan-openvino-") as scratch:
            served = directory if (directory / LANGUAGE_MODEL).is_file() else Path(scratch, "model")
            if served != directory:
                convert(installed.program, directory, served)
            command = [installed.program, "-I", str(PROGRAM), str(served), "--port", str(port), "--name", name]
            command += ["--dtype", dtype]
            command += [] if serving.threads is None else ["--threads", str(serving.threads)]
            with running(self.name, command, _environment()) as process:
                address = f"http://{LOOPBACK}:{port}"
                server = ChatServer(installed.version, process, address, name, serving.request_timeout_seconds)
                with server.client:
                    process.await_ready(server.ready, serving.start_timeout_seconds, _reason)
                    yield server


def convert(python: str, checkpoint: Path, directory: Path) -> None:
    """Write a checkpoint as OpenVINO files, weights in float32.

    Raises EngineLost where optimum-intel does not take the model, or would leave weights random.
    """
    _require_known_names(python, checkpoint)
    task = ["--task", "image-text-to-text", "--weight-format", "fp32"]
    done = _run([python, "-I", "-c", EXPORT, "export", "openvino", "--model", str(checkpoint), *task, str(directory)])
    if done.returncode or not (directory / LANGUAGE_MODEL).is_file():
        raise EngineLost(f"optimum-intel failed: {last_line(done.stderr, 'no message')}")


def _require_known_names(python: str, checkpoint: Path) -> None:
    """Raise EngineLost when the transformers of that Python knows tensors of the checkpoint by other names."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "report.json")
        done = _run([python, "-I", "-c", REPORT_NAMES, str(checkpoint), str(file)])
        if done.returncode:
            raise EngineLost(f"the checkpoint does not load there: {last_line(done.stderr, 'no message')}")
        report: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    if any(report.values()):
        example = next(name for names in report.values() for name in names)
        raise EngineLost(
            f"the transformers that optimum-intel uses names this model's weights otherwise (for example {example}), "
            "so they would be left random; use format checkpoint"
        )


def _reason(log: str) -> str:
    return last_line(log, "it said nothing")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, errors="replace", check=False)


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return inherited | {"HF_HUB_OFFLINE": "1"}


ENGINE: Engine = OpenVino()
