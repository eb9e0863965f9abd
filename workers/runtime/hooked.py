"""Modules that accelerate runs on a device of their own, with weights that may lie on the CPU or on disk meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .edits import Edits

HOOK = "_hf_hook"
"""Where accelerate keeps a module's hook, or several in one."""


def execution_device(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device that a module's forward runs on, ``otherwise`` where accelerate does not say."""
    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return otherwise


def stored_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, from where it is kept between calls."""
    parameter: Tensor = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    found: Tensor = _offloading(module).weights_map[name]
    return found


def replace_parameter(edits: Edits, module: nn.Module, name: str, value: Tensor) -> None:
    """Put another value in the place of a parameter, for the calls to come."""
    old = module._parameters[name]
    assert old is not None
    if old.is_meta:
        hook = _offloading(module)
        edits.set_instance_attribute(hook, "weights_map", _Replaced(hook.weights_map, name, value))
    else:
        edits.set_item(module._parameters, name, nn.Parameter(value, requires_grad=old.requires_grad))


def _hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get(HOOK)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _offloading(module: nn.Module) -> Any:
    for hook in _hooks(module):
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook
    raise RuntimeError(f"the weights of a {type(module).__name__} are on torch's meta device, and no hook loads them")


class _Replaced(Mapping[str, Tensor]):
    """The weights of an offloaded module, one of them another."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, value: Tensor) -> None:
        self._weights, self._name, self._value = weights, name, value

    def __getitem__(self, name: str) -> Tensor:
        return self._value if name == self._name else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
