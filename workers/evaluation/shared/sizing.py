"""Find how many tokens should go through a layer together, by doubling, once per model and device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.device.memory import is_out_of_memory

SMALLEST = 1024
"""Tokens; fewer leave matrix products too narrow."""

GAIN = 0.9
"""A doubled chunk must take less than this share of the time per token, or it is not worth its memory."""


@dataclass(frozen=True)
class Device:
    """Model and device that a size holds for."""

    model: str
    """Fingerprint of the model."""
    dtype: str
    device: str
    threads: int


_FOUND: dict[Device, int] = {}


def chunk_tokens(device: Device, run: Callable[[int], None], *, largest: int) -> int:
    """Find the number of tokens at which ``run(tokens)`` is no slower per token than at twice as many.

    Doubling ends at ``largest``, where memory is short, or where it does not pay any more. The answer is remembered
    in this process; :func:`remember` corrects it where memory turns out to be short later.
    """
    if device not in _FOUND:
        _FOUND[device] = _search(run, largest)
    return _FOUND[device]


def remember(device: Device, tokens: int) -> None:
    """Record that memory was short above ``tokens`` tokens."""
    _FOUND[device] = min(tokens, _FOUND.get(device, tokens))


def _search(run: Callable[[int], None], largest: int) -> int:
    best, tokens = SMALLEST, SMALLEST
    seconds = _seconds_per_token(run, tokens)
    while seconds is not None and 2 * tokens <= largest:
        tokens *= 2
        doubled = _seconds_per_token(run, tokens)
        if doubled is None or doubled > GAIN * seconds:
            break
        best, seconds = tokens, doubled
    return best


def _seconds_per_token(run: Callable[[int], None], tokens: int) -> float | None:
    """Time three runs and return the shortest, after one to warm up; None when memory is short."""
    shortest = float("inf")
    for repeat in range(4):
        started = time.perf_counter()
        try:
            run(tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat:
            shortest = min(shortest, time.perf_counter() - started)
    return shortest / tokens
