"""Start an engine's program so that it never outlives this process, and say why it ended."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.engines import supervisor
from workers.errors import EngineError, EngineLost

LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.2
_TAIL_BYTES = 65_536
_STOP_SECONDS = 4 * supervisor.GRACE_SECONDS


def find_program(name: str, variable: str) -> str | None:
    """Find the program that an environment variable names, else the one on the PATH, else None.

    Raises EngineError when the variable names what is no program.
    """
    named = os.environ.get(variable)
    if named:
        found = shutil.which(Path(named).expanduser())
        if found is None:
            raise EngineError(f"{variable} names {named}, which is no program")
        return str(found)
    return shutil.which(name)


def choose_port(wanted: int) -> int:
    """Return a port of the loopback address that is free. Raises EngineError where the wanted one is not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            raise EngineError(f"port {wanted} of {LOOPBACK} cannot be had ({error.strerror}); name another") from None
        port: int = probe.getsockname()[1]
        return port


class EngineProcess:
    """An engine's running program and its log."""

    def __init__(self, engine: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.engine, self.log = engine, log
        self._process = process

    def ended(self, *, within_seconds: float = 0.0) -> int | None:
        """Return the exit code if the program has ended, or ends so soon."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_seconds)
        return self._process.returncode

    def tell(self, order: bytes) -> None:
        """Write the supervisor an order; nothing where it has ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(order)
            self._process.stdin.flush()

    def await_ready(self, ready: Callable[[], bool], seconds: float, explain: Callable[[str], str]) -> None:
        """Wait until the engine answers. Raises EngineLost where it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not ready():
            code = self.ended(within_seconds=_POLL_SECONDS)
            if code is not None:
                raise EngineLost(f"{self.engine} does not start (exit code {code}): {explain(self.tail())}")
            if time.monotonic() > deadline:
                raise EngineLost(f"{self.engine} did not start within {seconds:g} s: {explain(self.tail())}")

    def tail(self) -> str:
        """Return the end of the program's output."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace")


@contextmanager
def running(engine: str, command: Sequence[str], environment: Mapping[str, str]) -> Iterator[EngineProcess]:
    """Run an engine's command while the block lasts.

    Its output goes to a file, which is kept where the block fails for an EngineError: the message names it.
    """
    descriptor, name = tempfile.mkstemp(prefix=f"skipplan-{engine}-", suffix=".log")
    log = Path(name)
    with os.fdopen(descriptor, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
    assert process.stdin is not None
    try:
        yield EngineProcess(engine, process, log)
    except EngineError as error:
        raise type(error)(f"{error}; its whole log: {log}") from None
    except BaseException:
        log.unlink()
        raise
    else:
        log.unlink()
    finally:
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
