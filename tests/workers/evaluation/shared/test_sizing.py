"""How many tokens go through a layer together, on a device whose speed and memory are known."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from workers.evaluation.shared import sizing
from workers.evaluation.shared.sizing import SMALLEST, Device, chunk_tokens, remember

DEVICE = Device("fingerprint", "float32", "cpu", 2)


class Machine:
    """A layer takes so many seconds by tokens, and no more tokens than there is room for."""

    def __init__(self, seconds: Callable[[int], float], room: int = 1 << 40) -> None:
        self._seconds, self._room = seconds, room
        self.clock, self.asked = 0.0, set[int]()

    def run(self, tokens: int) -> None:
        self.asked.add(tokens)
        if tokens > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.clock += self._seconds(tokens)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_FOUND", {})


def found(monkeypatch: pytest.MonkeyPatch, machine: Machine, *, device: Device = DEVICE, largest: int = 1 << 20) -> int:
    monkeypatch.setattr(time, "perf_counter", lambda: machine.clock)
    return chunk_tokens(device, machine.run, largest=largest)


def per_launch(seconds: float) -> Callable[[int], float]:
    """A device that needs the time of 4,096 tokens to begin, however few they are."""
    return lambda tokens: seconds * max(tokens, 4096)


def test_doubling_goes_on_while_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(per_launch(1e-6))
    assert found(monkeypatch, machine) == 4096
    assert machine.asked == {1024, 2048, 4096, 8192}


def test_a_device_that_gains_nothing_keeps_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, Machine(lambda tokens: 1e-6 * tokens)) == SMALLEST


def test_doubling_ends_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda tokens: 1.0, room=3000)
    assert found(monkeypatch, machine) == 2048
    assert max(machine.asked) == 4096


def test_doubling_ends_at_the_largest_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda tokens: 1.0)
    assert found(monkeypatch, machine, largest=5000) == 4096
    assert max(machine.asked) == 4096


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tokens: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        chunk_tokens(DEVICE, run, largest=1 << 20)


def test_a_size_is_found_once_for_a_model_and_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = Machine(per_launch(1e-6)), Machine(lambda tokens: 1.0), Machine(lambda tokens: 1e-6 * tokens)
    assert found(monkeypatch, first) == found(monkeypatch, again) == 4096
    assert not again.asked
    assert found(monkeypatch, other, device=Device("another model", "float32", "cpu", 2)) == SMALLEST


def test_a_size_that_turned_out_too_large_is_remembered_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, Machine(per_launch(1e-6))) == 4096
    remember(DEVICE, 2048)
    remember(DEVICE, 3000)  # what another chunk had room for later does not make it larger again
    assert found(monkeypatch, Machine(per_launch(1e-6))) == 2048
