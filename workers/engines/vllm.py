"""Serve with vLLM, which lives in an environment of its own that ``SKIPPLAN_VLLM_PYTHON`` names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from workers.engines.client import ChatServer
from workers.engines.interface import ChatRequest, Engine, Installed, Server, Serving
from workers.engines.process import LOOPBACK, choose_port, find_program, running
from workers.errors import EngineAbsent, EngineError
from workers.text import last_line, one_line

PYTHON_VARIABLE = "SKIPPLAN_VLLM_PYTHON"
PROBE = """
import importlib.util, json, sys
from importlib.metadata import packages_distributions, version
if importlib.util.find_spec("vllm") is None:
    sys.exit("it has no vllm")
found = packages_distributions()
names = ("vllm", "transformers", "torch", "skipplan_vllm")
versions = {name: version(found[name][0]) for name in names if name in found}
letters = "RS"
if "skipplan_vllm" in versions:
    from skipplan_vllm.plan import LETTERS
    letters = "".join(LETTERS)
print(json.dumps([versions, letters]))
"""
PLUGIN = "skipplan_vllm"
MODULE = "vllm.entrypoints.openai.api_server"
"""What ``vllm serve`` runs; that command fails where the package has another name than vllm, as a CPU build has."""
_ERROR = re.compile(r"Value error, (.+?) \[type=|((?:\w+\.)*\w*(?:Error|Exception|Killed)\b: .+)")
"""A line that names a cause; of pydantic's errors the second one, as the first counts them alone."""
_WRAPPERS = ("initialization failed due to", "Engine core initialization failed", "EngineCore encountered an issue")
"""vLLM ends with these, and tells to look for the cause above."""


class VllmServer(ChatServer):
    """A running vLLM."""

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """Ask for tokens by their ids, too."""
        body = super().body(request) | {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if request.exactly:
            body["min_tokens"] = request.max_tokens
        return body

    def kv_cache_tokens(self) -> int | None:
        """Blocks of the cache times the tokens of one."""
        metrics = self.client.get("/metrics").text
        found = re.search(r'^vllm:cache_config_info\{.*\bblock_size="(\d+)".*\bnum_gpu_blocks="(\d+)"', metrics, re.M)
        return int(found[1]) * int(found[2]) if found else None


class Vllm:
    """vLLM's OpenAI server, one process a model."""

    name, export_format = "vllm", "vllm"

    def installed(self) -> Installed:
        """Find the Python that has vLLM. Raises EngineError saying how to get it."""
        python = _python()
        done = subprocess.run(
            [python, "-I", "-c", PROBE], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            kind = EngineError if os.environ.get(PYTHON_VARIABLE) else EngineAbsent
            raise kind(
                f"vllm cannot be imported by {python} ({last_line(done.stderr, 'no message')}); install it into an "
                f"environment of its own and name that environment's python in {PYTHON_VARIABLE}"
            )
        versions, letters = json.loads(last_line(done.stdout, "{}"))
        return Installed(versions.pop("vllm"), python, versions, letters=letters)

    @contextmanager
    def serve(self, directory: Path, serving: Serving) -> Iterator[Server]:
        """Run ``vllm serve`` on the loopback address."""
        installed = self.installed()
        if serving.drafter is not None and PLUGIN not in installed.versions:
            raise EngineError(
                f"vLLM {installed.version} drafts for no request with an image unless the plug-in skipplan-vllm is in "
                f"its environment: {installed.program} -m pip install ./workers/engines/vllm_plugin"
            )
        port = choose_port(serving.port)
        model = f"skipplan-{uuid4().hex[:12]}"
        command = [installed.program, "-m", MODULE, *arguments(directory, serving, port, model)]
        with running(self.name, command, environment(serving)) as process:
            server = VllmServer(
                installed.version, process, f"http://{LOOPBACK}:{port}", model, serving.request_timeout_seconds
            )
            with server.client:
                process.await_ready(server.ready, serving.start_timeout_seconds, reason)
                yield server


def _python() -> str:
    """Return the Python that the variable names, else that of the ``vllm`` on the PATH, else this one."""
    python = find_program("vllm", PYTHON_VARIABLE)
    if python is None or os.environ.get(PYTHON_VARIABLE):
        return python or sys.executable
    beside = Path(python).resolve().with_name("python")
    return str(beside) if beside.is_file() else sys.executable


def arguments(directory: Path, serving: Serving, port: int, model: str) -> list[str]:
    """Return what ``vllm`` is called with."""
    listed = ["--model", str(directory), "--host", LOOPBACK, "--port", str(port), "--served-model-name", model]
    listed += ["--dtype", serving.dtype, "--max-num-seqs", str(serving.concurrency)]
    listed += ["--limit-mm-per-prompt", json.dumps({"image": serving.images, "video": 0, "audio": 0})]
    listed += ["--enable-prefix-caching" if serving.prefix_caching else "--no-enable-prefix-caching"]
    if not serving.prefix_caching:  # nor images, which vLLM would know again by their hashes
        listed += ["--mm-processor-cache-gb", "0"]
    if not serving.compiled:
        listed += ["--enforce-eager"]
    if serving.kv_cache_bytes is not None:
        # Without the share of memory, 0.9 by default, vLLM does not start where so much is not free.
        listed += ["--kv-cache-memory-bytes", str(serving.kv_cache_bytes), "--gpu-memory-utilization", "0.01"]
    if serving.drafter is not None:
        drafter = {"method": "draft_model", "model": str(serving.drafter)}
        listed += ["--speculative-config", json.dumps(drafter | {"num_speculative_tokens": serving.draft_length})]
    if serving.context_tokens is not None:
        listed += ["--max-model-len", str(serving.context_tokens)]
    return [*listed, *serving.options]


def environment(serving: Serving) -> dict[str, str]:
    """Return the environment that vLLM runs in: offline, without reports of its use."""
    mine = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if serving.threads is not None:
        mine |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(serving.threads), "KMP_BLOCKTIME": "5"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return inherited | mine


def reason(log: str) -> str:
    """Find the cause in vLLM's log: the last error that is not the one that sends readers to look above."""
    found = [match[1] or match[2] for line in log.splitlines() if (match := _ERROR.search(line))]
    causes = [each for each in found if not any(wrapper in each for wrapper in _WRAPPERS)]
    return one_line(causes[-1] if causes else last_line(log, "it said nothing"))[:800]


ENGINE: Engine = Vllm()
