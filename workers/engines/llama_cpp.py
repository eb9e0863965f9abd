"""Serve with llama.cpp's ``llama-server``, from GGUF files that its own converter makes of the export's checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from workers.engines.client import ChatServer
from workers.engines.interface import ChatReply, ChatRequest, Engine, Installed, Server, Serving
from workers.engines.process import LOOPBACK, choose_port, find_program, running
from workers.errors import EngineAbsent, EngineError, EngineLost
from workers.text import last_line

SERVER_VARIABLE, CONVERTER_VARIABLE = "SKIPPLAN_LLAMA_SERVER", "SKIPPLAN_LLAMA_CONVERTER"
PYTHON_VARIABLE = "SKIPPLAN_LLAMA_PYTHON"
"""The Python that runs the converter, which needs packages of its own, sentencepiece among them."""
MODEL, PROJECTOR, DRAFTER = "model.gguf", "mmproj.gguf", "drafter.gguf"
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Of llama.cpp's weights and of its keys and values, by torch's names."""
CONTEXT_TOKENS = 4096
_ERROR = re.compile(r"\b(?:error|failed|unsupported|unable)\b", re.IGNORECASE)


class LlamaServer(ChatServer):
    """A running ``llama-server``."""

    def __init__(self, *arguments: Any, prefix_caching: bool, drafts: bool) -> None:
        super().__init__(*arguments)
        self._prefix_caching, self._drafts = prefix_caching, drafts

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """Say whether earlier prompts may be used."""
        return super().body(request) | {"cache_prompt": self._prefix_caching}

    def ask(self, request: ChatRequest) -> ChatReply:
        """Leave out the tokens where some were drafted: the server reports the others alone, and not where they are."""
        reply = super().ask(request)
        return replace(reply, tokens=(), token_ids=None) if self._drafts else reply


class LlamaCpp:
    """llama.cpp's OpenAI server, one process a model."""

    name, export_format = "llama.cpp", "llama-cpp"

    def installed(self) -> Installed:
        """Find ``llama-server``. Raises EngineAbsent saying how to get it."""
        program = find_program("llama-server", SERVER_VARIABLE)
        if program is None:
            raise EngineAbsent(f"llama-server is not on the PATH; install llama.cpp, or name it in {SERVER_VARIABLE}")
        done = _run([program, "--version"])
        found = re.search(r"version: (\S+)", done.stdout + done.stderr)
        if found is None:
            raise EngineError(f"{program} does not say its version ({last_line(done.stderr, 'no message')})")
        return Installed(found[1], program)

    @contextmanager
    def serve(self, directory: Path, serving: Serving) -> Iterator[Server]:
        """Convert the checkpoint unless the directory has GGUF files, and run ``llama-server``."""
        installed, port = self.installed(), choose_port(serving.port)
        if serving.dtype not in TYPES:
            raise EngineError(f"llama.cpp is served in one of {', '.join(TYPES)}, not in {serving.dtype}")
        name = f"skipplan-{uuid4().hex[:12]}"
        each = serving.context_tokens or CONTEXT_TOKENS
        with tempfile.TemporaryDirectory(prefix="skipplan-gguf-") as scratch:
            model, projector = converted(directory, Path(scratch), TYPES[serving.dtype])
            command = [installed.program, "--model", str(model), "--mmproj", str(projector), "--alias", name]
            command += ["--host", LOOPBACK, "--port", str(port), "--no-ui", "--cache-ram", "0"]
            command += ["--parallel", str(serving.concurrency), "--ctx-size", str(each * serving.concurrency)]
            command += ["--cache-type-k", TYPES[serving.dtype], "--cache-type-v", TYPES[serving.dtype]]
            if serving.dtype == "float32":
                command += ["--flash-attn", "off"]  # which computes in float16 whatever the cache's type
            command += [] if serving.threads is None else ["--threads", str(serving.threads)]
            if serving.drafter is not None:
                command += _drafting(serving, Path(scratch))
            with running(self.name, [*command, *serving.options], os.environ) as process:
                server = LlamaServer(
                    installed.version,
                    process,
                    f"http://{LOOPBACK}:{port}",
                    name,
                    serving.request_timeout_seconds,
                    prefix_caching=serving.prefix_caching,
                    drafts=serving.drafter is not None,
                )
                with server.client:
                    process.await_ready(server.ready, serving.start_timeout_seconds, reason)
                    yield server


def _drafting(serving: Serving, scratch: Path) -> list[str]:
    """Return the options for the drafter, converted in ``scratch``; its keys and values are of the model's type."""
    assert serving.drafter is not None
    dtype, file = TYPES[serving.dtype], scratch / DRAFTER
    _convert(serving.drafter, file, dtype)
    command = ["--spec-type", "draft-simple", "--spec-draft-model", str(file), "--metrics"]
    command += ["--spec-draft-n-max", str(serving.draft_length)]
    return [*command, "--spec-draft-type-k", dtype, "--spec-draft-type-v", dtype]


def converted(directory: Path, scratch: Path, outtype: str) -> tuple[Path, Path]:
    """Return the language model and the vision tower as GGUF files, made in ``scratch`` where there are none.

    Raises EngineError where the converter is not there, EngineLost where it does not take the model.
    """
    own = directory / MODEL, directory / PROJECTOR
    if all(file.is_file() for file in own):
        return own
    files = scratch / MODEL, scratch / PROJECTOR
    for file, options in zip(files, ((), ("--mmproj",)), strict=True):
        _convert(directory, file, outtype, *options)
    return files


def _convert(directory: Path, file: Path, outtype: str, *options: str) -> None:
    converter = os.environ.get(CONVERTER_VARIABLE) or shutil.which("convert_hf_to_gguf.py")
    if converter is None or not Path(converter).expanduser().is_file():
        raise EngineError(
            f"llama.cpp's convert_hf_to_gguf.py is needed to serve {directory.name}; name it in {CONVERTER_VARIABLE}"
        )
    python = find_program(sys.executable, PYTHON_VARIABLE) or sys.executable
    done = _run([python, converter, str(directory), "--outtype", outtype, "--outfile", str(file), *options])
    if done.returncode or not file.is_file():
        raise EngineLost(f"llama.cpp cannot convert the model: {last_line(done.stderr, 'no message')}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)


def reason(log: str) -> str:
    """Find the cause in llama-server's log: the last line that speaks of an error."""
    found = [line.strip() for line in log.splitlines() if _ERROR.search(line)]
    return (found[-1] if found else last_line(log, "it said nothing"))[:800]


ENGINE: Engine = LlamaCpp()
