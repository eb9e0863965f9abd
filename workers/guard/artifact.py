"""Encode a guard as safetensors bytes: equal guards give equal bytes. ``workers.runtime.guard`` reads them."""

from __future__ import annotations

import json

from safetensors.torch import save

from workers.runtime.guard import FORMAT, TENSORS, Guard
from workers.runtime.tensor_file import KEY


def encode(guard: Guard) -> bytes:
    """Return the guard's file."""
    record = {name: value for name, value in vars(guard).items() if name not in TENSORS}
    tensors = {name: getattr(guard, name).contiguous() for name in TENSORS}
    return save(tensors, metadata={KEY: json.dumps(record | {"format": FORMAT}, sort_keys=True)})
