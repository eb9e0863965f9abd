"""Run the bridge in the environment of lmms-eval, and talk to it by lines of JSON."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from workers.errors import TaskError
from workers.text import last_line

PYTHON_VARIABLE = "SKIPPLAN_LMMS_EVAL_PYTHON"
BRIDGE = Path(__file__).with_name("bridge.py")
SCORE_SECONDS = 600.0
"""How long a score may take; to open and to read a task may take as long as its data need to come."""
_TAIL_BYTES = 65_536


class Harness:
    """The bridge with one open task. Its program starts with it, and ends with this process."""

    def __init__(self, python: str, task: str, include: str | None) -> None:
        """Open a task. Raises TaskError with the harness's reason."""
        if include is not None and not Path(include).is_dir():
            raise TaskError(f"lmms-eval task {task}: {include} is no directory")
        self._name = task
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the program
        self._lock = threading.Lock()
        self._rest = b""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(BRIDGE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=include,
                env=inherited | {"TQDM_DISABLE": "1"},
                bufsize=0,
                start_new_session=True,  # Ctrl-C in the terminal is for this process, which ends the other
            )
        except OSError as error:
            raise TaskError(f"{PYTHON_VARIABLE} names {python}, which does not start: {error.strerror}") from None
        self.close = weakref.finalize(self, _end, self._process, self._log)
        """Ends the program: when nothing uses it any more, and when this process ends."""
        try:
            self.description: dict[str, Any] = self._ask({"open": {"task": task, "include": include}})
        except TaskError:
            self.close()
            raise

    @property
    def has_ended(self) -> bool:
        """Whether its program has ended."""
        return self._process.poll() is not None

    def read(self, images: Path, limit: int | None) -> Iterator[dict[str, Any]]:
        """Yield the task's documents; their images are written to a directory. Raises TaskError."""
        with self._lock:
            self._send({"read": {"images": str(images), "limit": limit}})
            while "sample" in (reply := self._reply(None)):
                yield reply["sample"]

    def score(self, document: int, content: str, answer: str) -> dict[str, float]:
        """Score an answer to a document whose hash is ``content``, by metric. Raises TaskError."""
        reply = self._ask({"score": {"document": document, "hash": content, "answer": answer}}, SCORE_SECONDS)
        return dict(reply["scores"])

    def _ask(self, request: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        with self._lock:
            self._send(request)
            try:
                return self._reply(seconds)
            except KeyboardInterrupt:  # the reply would be taken for that to the next request
                self._process.kill()
                self._process.wait()
                raise

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:
            raise self._lost() from None

    def _reply(self, seconds: float | None) -> dict[str, Any]:
        """Read one line. Raises TaskError for what the bridge refuses, and where it ends or takes longer."""
        assert self._process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                self._process.wait()
                raise TaskError(f"lmms-eval task {self._name}: an answer was not scored within {seconds:g} s")
            found = os.read(self._process.stdout.fileno(), 1 << 16)
            if not found:
                raise self._lost()
            self._rest += found
        line, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise TaskError(f"lmms-eval task {self._name}: {reply['error']}")
        return reply

    def _lost(self) -> TaskError:
        code = self._process.wait()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        said = last_line(self._log.read().decode(errors="replace"), "it said nothing")
        return TaskError(f"lmms-eval task {self._name}: the harness ended (exit code {code}): {said}")


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for each in (process.stdin, process.stdout, log):
        if each is not None:
            each.close()


def open_task(task: str, include: str | None) -> Harness:
    """Open a task once in a process; again where its program ended. Raises TaskError, also where there is none."""
    if (found := opened(task, include)).has_ended:
        opened.cache_clear()
        found = opened(task, include)
    return found


@lru_cache(maxsize=8)
def opened(task: str, include: str | None) -> Harness:
    """Open a task, or return the one that was opened. Raises TaskError."""
    named = os.environ.get(PYTHON_VARIABLE)
    if not named:
        raise TaskError(
            f"lmms-eval task {task}: {PYTHON_VARIABLE} is not set; install lmms-eval into an environment of its own "
            "(pip install lmms-eval) and name that environment's python in it"
        )
    python = shutil.which(Path(named).expanduser())
    if python is None:
        raise TaskError(f"{PYTHON_VARIABLE} names {named}, which is no program")
    return Harness(str(Path(python).absolute()), task, include)  # links kept: they are what makes an environment
