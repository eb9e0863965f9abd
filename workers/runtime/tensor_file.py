"""Read what was fitted from a safetensors file: float32 tensors and a JSON record, with torch alone."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

KEY = "skipplan"
"""The record's name in the file's metadata."""


def read_tensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record. Raises ValueError, KeyError, TypeError where it is no such file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    record = json.loads(header.pop("__metadata__")[KEY])
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}, not F32")
        first, end = entry["data_offsets"]
        part = bytearray(content[start + first : start + end])
        tensors[name] = torch.frombuffer(part, dtype=torch.float32).reshape(entry["shape"])
    return tensors, record
