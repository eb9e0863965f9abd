"""Run a command for as long as the process that started this one lives: ``python -I supervisor.py COMMAND...``.

Standard input is a pipe: a byte on it halts the command's processes or lets them go on, in the order written, and its
end says that the other process has let go, or died, however it died. Then the command and everything that it started
are ended. Run by path; it imports nothing of this project.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE_SECONDS = 10.0
"""How long the command has to end by itself before it is killed."""
POLL_SECONDS = 0.1
HALT, GO_ON = b"h", b"g"
"""Written to this process: the command's processes are stopped, and go on. Signals could overtake each other."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main(command: list[str]) -> int:
    """Run the command; its exit code, as a shell gives it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what outlives the command becomes ours to end
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - this process has one thread
    )
    try:
        while child.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
            if not readable:
                continue
            order = os.read(sys.stdin.fileno(), 1)
            if not order:
                break
            _signal(child, signal.SIGSTOP if order == HALT else signal.SIGCONT)
    finally:
        _end(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Pass a signal on to every process of the command's group."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _prctl(option: int, value: int) -> None:
    """Linux's prctl; nothing where there is none: then what left the command's session is not ended."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal(child, signal.SIGCONT)  # what is halted does not end
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := _children()) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(process, 0)


def _children() -> list[int]:
    """Return processes whose parent this one is, orphans of the command included."""
    try:
        return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
