"""Run a command that uses Ray in a child process, and clean up when that ends without a word.

Ray's core calls ``_exit`` in the process that uses it when its node dies (at the next write to it) or its head does
not answer for a minute; crashes and the kernel's out-of-memory killer end it as suddenly. The supervisor uses no Ray
and little memory. It puts the child's job back, says so in one line, and starts a service again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from optimizer.errors import ClusterOrDatabaseFault, Interrupted
from optimizer.service import channel, logs
from workers.errors import ClusterLost
from workers.text import one_line

STEADY_SECONDS = 600.0
"""After so long a run the next sudden end counts as the first."""

LONGEST_PAUSE_SECONDS = 300.0

LINE_OF_RAY = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] ")
"""Begins what Ray's core writes to standard error, about a cluster that ends and about its own ways to recover."""

FORWARDED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it had reported until then."""

    code: int
    facts: dict[str, Any]

    @property
    def orderly(self) -> bool:
        """Whether the exit code is the command's own."""
        return bool(self.facts.get("orderly"))

    @property
    def reason(self) -> str:
        """Say how a child ended that did not say it itself."""
        if self.code == -signal.SIGKILL:
            return "the process was killed (SIGKILL), as the system does when memory runs out"
        if self.code < 0:
            return f"the process crashed ({signal.Signals(-self.code).name})"
        return f"Ray ended the process (exit code {self.code}), as it does when its node or head is gone"


class Supervisor:
    """Run one command, in one child after another where it ``restarts``; ``given`` is each one's standard input."""

    def __init__(self, command: list[str], *, restarts: bool = False, given: str | None = None) -> None:
        self._command, self._restarts, self._given = command, restarts, given
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()

    def run(self) -> int:
        """Run the command to its orderly end, or to a sudden one that is not followed by another try: its exit code."""
        with self._forwarding():
            return self._run()

    def run_once(self) -> dict[str, Any]:
        """Run the command to its orderly end, and return what it reported.

        Raises ClusterLost where it ended suddenly, and Interrupted where a signal ended it; its job is put back before.
        """
        with self._forwarding():
            ended = self._run_child()
        if ended.orderly:
            return ended.facts
        stopped = self._stop.is_set()
        outcome = _give_back(ended, stopped=stopped)
        raise Interrupted(f"interrupted{outcome}") if stopped else ClusterLost(f"{ended.reason}{outcome}")

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Pass signals on to the child; Python lets only the main thread do so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self._forward) for each in FORWARDED}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _run(self) -> int:
        in_a_row = 0
        while True:
            began = time.monotonic()
            ended = self._run_child()
            if ended.orderly:
                return ended.code
            stopped = self._stop.is_set()
            line = "interrupted" if stopped else ended.reason
            if self._restarts:
                logs.configure(ended.facts.get("log_format"))
                logs.log("process_lost", reason=line)
            outcome = _give_back(ended, stopped=stopped)
            if stopped or not self._restarts:
                sys.stderr.write(f"skipplan: {line}{outcome}\n")
                return Interrupted.exit_code if stopped else ClusterOrDatabaseFault.exit_code
            in_a_row = 0 if time.monotonic() - began > STEADY_SECONDS else in_a_row + 1
            pause = min(LONGEST_PAUSE_SECONDS, 2.0 ** (in_a_row - 1))
            logs.log("resting", seconds=pause)
            if self._stop.wait(pause):
                return Interrupted.exit_code

    def _run_child(self) -> Ended:
        reading, writing = os.pipe()
        errors = os.dup(2)
        with os.fdopen(reading, encoding="utf-8") as stream:
            self._child = subprocess.Popen(
                self._command,
                env={**os.environ, channel.ENVIRONMENT: f"{writing}:{errors}:{os.getpid()}"},
                stdin=None if self._given is None else subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[writing, errors],
                process_group=0,  # so that a terminal's Ctrl-C reaches it once, from here
            )
            os.close(writing)
            os.close(errors)
            if self._child.stdin is not None:
                with suppress(OSError), self._child.stdin as stdin:  # it may have ended already
                    stdin.write((self._given or "").encode())
            if self._stop.is_set():
                self._child.terminate()
            facts: dict[str, Any] = {}
            readers = [
                threading.Thread(target=_read, args=(stream, facts), daemon=True),
                threading.Thread(target=_pass_on, args=(self._child.stderr,), daemon=True),
            ]
            for reader in readers:
                reader.start()
            code = self._child.wait()
            for reader in readers:
                reader.join(1)  # both end with the child, unless a process of its own has them too
        return Ended(code, facts)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if self._child is not None:
            self._child.send_signal(number)


def _read(stream: Any, facts: dict[str, Any]) -> None:
    for line in stream:
        if line.endswith("\n"):  # else it was cut off by the end
            facts.update(json.loads(line))


def _pass_on(stream: Any) -> None:
    for line in stream:
        if not LINE_OF_RAY.match(line.decode(errors="replace")):
            sys.stderr.write(line.decode(errors="replace"))  # in a notebook it has no buffer for bytes
            sys.stderr.flush()


def _give_back(ended: Ended, *, stopped: bool) -> str:
    """Put back the jobs that the child held, those that it still does; say what has become of them."""
    held = [fact for name, fact in ended.facts.items() if fact and name.startswith(channel.HELD)]
    return "".join(_give_one_back(each, ended, stopped=stopped) for each in held)


def _give_one_back(held: Mapping[str, Any], ended: Ended, *, stopped: bool) -> str:
    from optimizer.service import runner
    from storage.database import Database
    from storage.errors import StorageError
    from storage.queue import jobs, leases

    try:
        with Database.open(held["url"], create=False) as db, logs.of_job(held["job"]):
            job = jobs.get(db, held["job"])
            if (job.state, job.owner, job.attempt) == ("running", held["owner"], held["attempt"]):
                if not held["resumable"]:
                    leases.fail(db, job, ended.reason)
                    return "; what was measured is kept, run the command again to go on"
                if stopped:
                    leases.release(db, job, "interrupted")
                else:
                    runner.put_back(db, job, ClusterLost(ended.reason))
            return f"; {runner.goes_on(db, job)}"
    except StorageError as error:
        return f"; job {held['job']} is taken again when its lease has ended ({one_line(error)})"
