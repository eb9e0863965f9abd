"""An engine's program: how it starts, why it does not, and that it never outlives the process that asked for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine

from workers.engines.interface import Serving
from workers.engines.process import choose_port, find_program, running
from workers.errors import EngineError, EngineLost

# The program leaves its session, starts another that ignores SIGTERM, and both write their numbers to files.
STUBBORN = """
import os, signal, subprocess, sys, time
from pathlib import Path
place = Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 2:
    code = (place / "code").read_text()
    subprocess.Popen([sys.executable, "-I", "-c", code, place, "child"], start_new_session=True)
(place / f"{len(sys.argv)}.tmp").write_text(str(os.getpid()))
(place / f"{len(sys.argv)}.tmp").rename(place / f"{len(sys.argv)}.pid")
time.sleep(120)
"""
# The supervisor as it is, but for how long it waits for a program that ignores SIGTERM.
PARENT = """
import sys, time
from pathlib import Path
from workers.engines import supervisor
from workers.engines.process import running
program = Path(supervisor.__file__).read_text()
assert "GRACE_SECONDS = 10.0" in program
supervisor.__file__ = sys.argv[1] + "/supervisor.py"
Path(supervisor.__file__).write_text(program.replace("GRACE_SECONDS = 10.0", "GRACE_SECONDS = 0.5"))
with running("stubborn", [sys.executable, "-I", "-c", open(sys.argv[1] + "/code").read(), sys.argv[1]], {}):
    time.sleep(120)
"""


def await_that(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_it_ends_with_the_process_that_started_it_whatever_ended_that(tmp_path: Path, number: int) -> None:
    (tmp_path / "code").write_text(STUBBORN)
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=os.environ) as parent:
        pids = [tmp_path / "2.pid", tmp_path / "3.pid"]
        await_that(lambda: all(file.is_file() for file in pids))
        started = [int(file.read_text()) for file in pids]
        assert all(map(lives, started))
        parent.send_signal(number)
        parent.wait(10)
    await_that(lambda: not any(map(lives, started)))


def test_a_block_that_ends_ends_it_and_its_log(tmp_path: Path) -> None:
    with running("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], {}) as process:
        assert process.ended() is None and process.log.is_file()
    assert process.ended() is not None and not process.log.exists()


def test_one_that_does_not_start_says_why_and_keeps_its_log() -> None:
    with pytest.raises(EngineLost) as caught, ScriptedEngine("no start").serve(Path(), Serving()):
        pass
    said, _, log = str(caught.value).partition("; its whole log: ")
    assert said == "scripted does not start (exit code 1): weights: there is no tensor named head"
    assert "no tensor" in Path(log).read_text()
    Path(log).unlink()


@pytest.mark.parametrize("fault", ["never ready", "other model"])
def test_one_that_is_not_ready_in_time_is_given_up(fault: str) -> None:
    with (
        pytest.raises(EngineLost, match="did not start within 1 s") as caught,
        ScriptedEngine(fault).serve(Path(), Serving(start_timeout_seconds=1)),
    ):
        pass
    Path(str(caught.value).rpartition(" ")[2]).unlink()


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 cannot be had"):
            choose_port(port)
    assert choose_port(port) == port


def test_a_variable_that_names_no_program_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_ENGINE", str(tmp_path / "absent"))
    with pytest.raises(EngineError, match=r"^SOME_ENGINE names .*absent, which is no program$"):
        find_program("sh", "SOME_ENGINE")
    monkeypatch.delenv("SOME_ENGINE")
    assert Path(find_program("sh", "SOME_ENGINE") or "").name == "sh"
    assert find_program("no-such-program", "SOME_ENGINE") is None
