"""Spread a model's layers over several devices of one machine, by accelerate's device maps.

Everything but the decoder layers lies on the first device, the layers in order on all of them. accelerate moves a
layer's input to its device. A worker has the layers hand their states back to the first device, where everything that
reads states between layers finds them; while latency is measured, states stay where they are, as they do for a user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workers.errors import ModelError
from workers.layerwise.hooks import hidden_of, with_hidden
from workers.runtime.locate import ancestors, locate

FOR_WEIGHTS = 0.9
"""Share of a device's memory that weights may take; the rest is for what is computed."""
GB = 1e9

DeviceMap = dict[str, str]


HeldBytes = Callable[[str, torch.Tensor], float]
"""The bytes that a parameter or buffer of a name takes once it is loaded."""


def spread_layers(
    model: nn.Module,
    dtype: torch.dtype,
    rooms: Sequence[tuple[str, int]],
    name: str,
    held: HeldBytes | None = None,
) -> DeviceMap:
    """Return a device map of a model on torch's meta device; ``rooms`` are devices of a worker and their bytes.

    Devices get equally much, as far as each has room. ``held`` counts quantised weights; others are in ``dtype``.

    Raises:
        ModelError: the weights do not fit; the message says what would do.
    """
    stack = locate(model)
    quantised = held is not None
    held = held or (lambda _, each: each.numel() * (dtype.itemsize if each.is_floating_point() else each.itemsize))
    layers = [_bytes(layer, f"{stack.path}.{number}.", held) for number, layer in enumerate(stack.layers)]
    total = _bytes(model, "", held)
    usable = [int(FOR_WEIGHTS * room) for _, room in rooms]
    outside = total - sum(layers)
    filled = _balance(layers, outside, usable) or _fill(layers, outside, usable)
    if filled is None:
        smallest = min(room for _, room in rooms)
        needed = -(-total // int(FOR_WEIGHTS * smallest))
        stored = "as they are quantised" if quantised else f"in {str(dtype).removeprefix('torch.')}"
        raise ModelError(
            f"model {name}: its weights take {total / GB:.1f} GB {stored}, and a "
            f"worker's {len(rooms)} GPU{'s have' if len(rooms) > 1 else ' has'} room for {sum(usable) / GB:.1f} GB of "
            f"weights; set cluster.gpus_per_worker to {max(needed, len(rooms) + 1)} or more, all of one node: layers "
            "are not spread over several nodes"
        )
    first = rooms[0][0]
    places = dict.fromkeys(_outside(model, stack.path), first)
    return places | {f"{stack.path}.{number}": rooms[device][0] for number, device in enumerate(filled)}


def _bytes(module: nn.Module, prefix: str, held: HeldBytes) -> int:
    named = (*module.named_parameters(), *module.named_buffers())
    return math.ceil(sum(held(prefix + name, each) for name, each in named))


def _balance(layers: Sequence[int], outside: int, rooms: Sequence[int]) -> list[int] | None:
    """Return the device of every layer, in order, equally much on each; None where one has too little room."""
    share = (outside + sum(layers)) / len(rooms)
    found, filled, before = [], [0] * len(rooms), outside
    filled[0] = outside
    for size in layers:
        device = min(int((before + size / 2) / share), len(rooms) - 1)
        before += size
        filled[device] += size
        found.append(device)
    return found if all(used <= room for used, room in zip(filled, rooms, strict=True)) else None


def _fill(layers: Sequence[int], outside: int, rooms: Sequence[int]) -> list[int] | None:
    """Return the device of every layer, in order, one device filled after the other; None where they do not fit."""
    device, left = 0, rooms[0] - outside
    found = []
    if left < 0:
        return None
    for size in layers:
        while size > left:
            device += 1
            if device == len(rooms):
                return None
            left = rooms[device]
        left -= size
        found.append(device)
    return found


def _outside(model: nn.Module, path: str) -> Iterator[str]:
    """Names of modules, parameters and buffers beside the way down to the layers."""
    way, names = list(ancestors(model, path)), path.split(".")
    for depth, module in enumerate(way):
        prefix = ".".join(names[:depth])
        own = [name for name, _ in module.named_children() if name != names[depth]]
        own += [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        yield from (f"{prefix}.{name}".lstrip(".") for name in own)


class Spread:
    """A model on several devices, the first of them where its inputs, outputs and states are."""

    def __init__(self, model: Any) -> None:
        self._away = False
        stack = locate(model)
        places = {str(place) for place in model.hf_device_map.values()} - {"disk"}
        self.devices = (model.device, *sorted({_device(place) for place in places} - {model.device}, key=str))
        home: torch.device = model.device
        for layer in stack.layers:
            layer.register_forward_hook(self._returning(home))

    def _returning(self, home: torch.device) -> Callable[..., Any]:
        def hand_back(layer: nn.Module, args: Any, output: Any) -> Any:
            state = hidden_of(output)
            return output if self._away or state.device == home else with_hidden(output, state.to(home))

        return hand_back

    @contextmanager
    def states_left_in_place(self) -> Iterator[None]:
        """Have states go from layer to layer as accelerate moves them."""
        self._away = True
        try:
            yield
        finally:
            self._away = False


def _device(place: str) -> torch.device:
    return torch.device("cuda", int(place)) if place.isdigit() else torch.device(place)
