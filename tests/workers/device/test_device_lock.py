"""Timing and computing on one device, across processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.device import lock as device_lock
from workers.device.memory import peak_bytes
from workers.errors import MeasurementError, ModelError
from workers.messages import ModelSource

CPU = torch.device("cpu")
HOLDER = """
import sys, torch
from workers.device import lock as device_lock
with getattr(device_lock, sys.argv[1])(torch.device("cpu")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    """Locks of this test alone: other tests of the machine measure too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def holder() -> Iterator[object]:
    """Start another process that holds the device for computing or timing until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_timing_is_refused_while_another_process_computes_and_granted_once_it_died(holder) -> None:
    other = holder("computing")
    with pytest.raises(MeasurementError, match=r"other workers kept using cpu for 0\.1 s"):  # noqa: SIM117
        with device_lock.timing(CPU, wait_seconds=0.1):
            pass
    with device_lock.computing(CPU):  # computing beside it is fine
        pass
    other.kill()
    other.wait()
    with device_lock.timing(CPU, wait_seconds=5):
        pass


def test_a_model_is_not_loaded_while_another_process_times(holder, tmp_path, small_task) -> None:
    other = holder("timing")
    done = threading.Event()

    def load() -> None:
        with pytest.raises(ModelError, match=r"has no config\.json"):
            Handler.load(ModelSource(str(tmp_path), device="cpu"), small_task, WorkerSettings(0))
        done.set()

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    assert not done.wait(0.5)
    other.kill()
    assert done.wait(10)
    thread.join()
    with device_lock.timing(CPU, wait_seconds=5):  # nothing is held after a load that failed
        pass


def test_computing_waits_while_another_process_times(holder) -> None:
    other = holder("timing")
    done = threading.Event()

    def compute() -> None:
        with device_lock.computing(CPU):
            done.set()

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    assert not done.wait(0.3)
    other.kill()
    assert done.wait(10)
    thread.join()


def test_a_waiting_timer_gets_in_among_workers_that_never_pause() -> None:
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            with device_lock.computing(CPU):
                time.sleep(0.05)

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with device_lock.timing(CPU, wait_seconds=20):
            pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_peak_memory_is_what_the_work_took_and_gave_back() -> None:
    size = 64 * 2**20

    def work() -> None:
        first = torch.ones(size // 4)
        first + 1  # a second tensor of the size beside the first

    for _ in range(2):  # what was freed before does not count as taken already
        peak = peak_bytes(work, CPU)
        assert peak is not None
        assert 1.95 * size < peak < 2.5 * size  # the kernel counts pages in lots
    nothing = peak_bytes(lambda: None, CPU)
    assert nothing is not None and nothing < size / 4
