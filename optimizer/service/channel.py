"""Tell a supervising process what this one holds, so that it can clean up after a sudden end.

Ray's core ends the process that uses it, without a word and past every ``finally``, when its node or its head is gone.
Commands that use Ray therefore run in a child process; see :mod:`optimizer.service.supervisor`. Where there is no
supervisor (the Python API, tests), nothing is sent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from storage.database import Database
    from storage.queue.jobs import Job

ENVIRONMENT = "SKIPPLAN_SUPERVISOR"
"""In a supervised process: the open files for facts and for standard error, and the supervisor's process, by number.

Standard error has a file of its own because Ray's core writes to number 2 what is not for users.
"""

HELD = "held "
"""Begins the name of the fact that a job was held, which its number ends."""

PR_SET_PDEATHSIG = 1

_streams: list[TextIO] = []
"""The one to the supervisor, if there is one."""


def open_channel() -> bool:
    """Connect to the supervisor that started this process, and end with it; whether there is one."""
    given = os.environ.pop(ENVIRONMENT, None)  # Ray's processes inherit the environment, and are not supervised
    if given is None:
        return False
    file, errors, supervisor = (int(each) for each in given.split(":"))
    for each in (file, errors):
        os.set_inheritable(each, False)
    _streams.append(os.fdopen(file, "w", buffering=1, encoding="utf-8"))
    sys.stderr = os.fdopen(errors, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
    with suppress(OSError, AttributeError):  # Linux only; elsewhere a process whose supervisor was killed ends its job
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        raise SystemExit(f"{ENVIRONMENT} is set by skipplan itself; unset it")
    return True


def tell(**facts: Any) -> None:
    """Tell the supervisor facts by name, in the place of earlier ones: ``held JOB``, ``log_format``, ``orderly``."""
    for stream in _streams:
        with suppress(OSError):  # it is gone, and so will this process be
            stream.write(json.dumps(facts) + "\n")


def tell_held(db: Database, job: Job, *, resumable: bool) -> None:
    """Let the supervisor know a job that this process holds, or held."""
    url = db.engine.url.render_as_string(hide_password=False)
    held = {"url": url, "job": job.id, "owner": job.owner, "attempt": job.attempt, "resumable": resumable}
    tell(**{f"{HELD}{job.id}": held})


def tell_ended(job: Job) -> None:
    """Let the supervisor know that a job has ended here, or is somebody else's by now."""
    tell(**{f"{HELD}{job.id}": None})
