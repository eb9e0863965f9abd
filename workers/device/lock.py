"""Lock a device: many workers may compute on it, or one may time.

Workers of one job, of several jobs and of several service processes may share a machine's cores or a GPU. A latency
taken while another of them computes is not this device's latency, so timing asks for the device alone. The locks are
files of the node's temporary directory: the kernel gives them back when a worker dies. Other programs, and containers
with a temporary directory of their own, are not seen.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch

from workers.errors import MeasurementError

WAIT_SECONDS = 600.0
"""How long timing waits for the others before it is refused."""
_POLL_SECONDS = 0.01


@contextmanager
def computing(*devices: torch.device) -> Iterator[None]:
    """Use devices beside other workers; waits while one of them times, or is about to."""
    with ExitStack() as locks:
        for device in _in_order(devices):
            gate, room = map(locks.enter_context, _open(device))
            # Passing the gate, which a waiting timer keeps shut, lets the timer in among many computing workers.
            fcntl.flock(gate, fcntl.LOCK_SH)
            fcntl.flock(room, fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextmanager
def timing(*devices: torch.device, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Use devices alone among workers.

    Raises:
        MeasurementError: other workers still used one after ``wait_seconds``.
    """
    deadline = time.monotonic() + wait_seconds
    with ExitStack() as locks:
        for device in _in_order(devices):
            for file in map(locks.enter_context, _open(device)):
                if not _take(file, deadline):
                    raise MeasurementError(
                        f"latency cannot be measured: other workers kept using {name(device)} for {wait_seconds:g} s; "
                        "let their jobs end, or give each worker a device of its own"
                    )
        yield


def _in_order(devices: tuple[torch.device, ...]) -> list[torch.device]:
    """Return devices in one order for all workers, so that no two of them wait for each other."""
    return sorted(set(devices), key=name)


def name(device: torch.device) -> str:
    """Name the device the same in every process of this machine, whatever part of the GPUs it sees."""
    if device.type != "cuda":
        return device.type
    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"


def _open(device: torch.device) -> tuple[IO[bytes], IO[bytes]]:
    folder = Path(tempfile.gettempdir()) / f"skipplan-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    gate, room = (folder / f"{name(device)}.{part}" for part in ("gate", "room"))
    return gate.open("ab"), room.open("ab")


def _take(file: IO[bytes], deadline: float) -> bool:
    """Lock a file for oneself; false when others held it until the deadline."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True
