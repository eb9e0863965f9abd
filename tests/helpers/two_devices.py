"""Several devices on a CPU: every tensor is on ``cpu:0`` or ``cpu:1``, and what mixes them is an error, as on GPUs.

torch computes on the CPU throughout. A tensor's device is that of its memory: it is noted when the memory is made, and
changes by a copy alone. Operations on tensors of different devices raise what torch raises for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE_OF = torch.Tensor.device.__get__
COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})


class Places:
    """The devices of memory, by number; memory that nothing is known of is on the first."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.copies = 0
        """Copies from one device to another."""

    def of(self, tensor: Tensor) -> int:
        if tensor.is_meta:
            return 0
        known = self._known.get(tensor.untyped_storage()._cdata)
        return 0 if known is None or known[0].expired() else known[1]

    def put(self, tensor: Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), number)


class _Reported(TorchFunctionMode):
    """Report the devices, and leave tensors alone that are where they are to go."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == DEVICE_OF and not args[0].is_meta:
            return torch.device("cpu", self._places.of(args[0]))
        if func is torch.Tensor.to and not args[0].is_meta:
            return self._to(args[0], *args[1:], **kwargs)
        if func is torch.Tensor.cpu:
            return self._to(args[0], "cpu:0")
        if func is torch.tensor and kwargs.get("device") is not None:  # makes its memory unseen
            result = func(*args, **kwargs)
            self._places.put(result, torch.device(kwargs["device"]).index or 0)
            return result
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest = [each for each in args if not isinstance(each, str | torch.device | Tensor)]
        asked = [each for each in (*args, kwargs.pop("device", None)) if isinstance(each, str | torch.device | Tensor)]
        for each in asked:
            if isinstance(each, Tensor):
                rest.append(each.dtype)
            device = torch.device("cpu", self._places.of(each)) if isinstance(each, Tensor) else torch.device(each)
            if device.type != "cpu":
                return torch.Tensor.to(tensor, *args, device=device, **kwargs)
            number = device.index or 0
            if number != self._places.of(tensor):
                self._places.copies += 1
                tensor = torch.Tensor.to(tensor, torch.device("cpu", number))
        return torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor


class _Kept(TorchDispatchMode):
    """Note where results are, and refuse operations on tensors of different devices."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        numbers = {self._places.of(each) for each in given if each.dim() > 0}
        if len(numbers) > 1 and func not in COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device, found two in {func}")
        result = func(*args, **kwargs)
        device = kwargs.get("device")
        inherited = self._places.of(given[0]) if func in COPIES else next(iter(numbers), 0)
        number = inherited if device is None or (device.index is None and given) else (device.index or 0)
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and not each.is_meta and not any(each is one for one in given):
                self._places.put(each, number)
        return result


@contextmanager
def two_devices(places: Places) -> Iterator[Places]:
    """Have tensors of this thread on ``cpu:0`` and ``cpu:1``."""
    with _Reported(places), _Kept(places):
        yield places
