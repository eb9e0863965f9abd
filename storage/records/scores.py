"""Pack per-sample scores as bytes: one bit a sample where all are right or wrong, eight bytes a sample otherwise.

A sample that failed is NaN. Divergences take four bytes a sample.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain

from storage.errors import InvalidValue

_BITS, _DOUBLES = b"\x01", b"\x02"
_SCORES_OF_BYTE = [tuple(float(byte >> index & 1) for index in range(7, -1, -1)) for byte in range(256)]


def pack(scores: Sequence[float]) -> bytes:
    """Scores in [0, 1], NaN for a sample that failed, in the split's order, as bytes; ``unpack`` gives the same floats.

    Raises ``InvalidValue`` for a score outside [0, 1].
    """
    for index, score in enumerate(scores):
        if not (math.isnan(score) or 0.0 <= score <= 1.0):
            raise InvalidValue(f"score {score} of sample {index} is outside [0, 1]")
    if all(score in (0, 1) for score in scores):
        bits = "".join("1" if score else "0" for score in scores)
        padded = bits + "0" * (-len(bits) % 8)
        return _BITS + int("0" + padded, 2).to_bytes(len(padded) // 8, "big")
    return _DOUBLES + struct.pack(f"<{len(scores)}d", *scores)


def unpack(data: bytes, n: int) -> tuple[float, ...]:
    """Return the scores of ``n`` samples. Raises ``InvalidValue`` for bytes that ``pack`` did not write."""
    kind, body = data[:1], data[1:]
    if kind == _BITS and len(body) == (n + 7) // 8:
        return tuple(chain.from_iterable(map(_SCORES_OF_BYTE.__getitem__, body)))[:n]
    if kind == _DOUBLES and len(body) == 8 * n:
        return tuple(struct.unpack(f"<{n}d", body))
    raise InvalidValue(f"{len(data)} bytes do not hold the scores of {n} samples")


def pack_divergences(values: Sequence[float]) -> bytes:
    """Per-sample divergences as 32-bit floats; NaN stands for a sample that failed.

    Raises ``InvalidValue`` for a negative or infinite one.
    """
    for index, value in enumerate(values):
        if not (math.isnan(value) or 0.0 <= value < math.inf):
            raise InvalidValue(f"divergence {value} of sample {index} is negative or infinite")
    return struct.pack(f"<{len(values)}f", *values)


def unpack_divergences(data: bytes, n: int) -> tuple[float, ...]:
    """Return the divergences of ``n`` samples. Raises ``InvalidValue`` for bytes of another length."""
    if len(data) != 4 * n:
        raise InvalidValue(f"{len(data)} bytes do not hold the divergences of {n} samples")
    return tuple(struct.unpack(f"<{n}f", data))
