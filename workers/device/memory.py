"""Read a device's memory, and measure the peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container under Linux reads its limit: of control groups, version 2 and 1."""


def memory_bytes(device: torch.device) -> int:
    """Return the memory that this process's tensors can take in all: the GPU's own, or a part of the machine's.

    That part is as large as that of its threads among the processors, since there may be a worker for each; of a
    container it is a part of its limit.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (file.read_text().strip() for file in _LIMITS if file.is_file())
    processors = os.cpu_count() or 1
    whole = min([machine, *(int(limit) for limit in limits if limit.isdigit())])
    return whole * min(torch.get_num_threads(), processors) // processors


def peak_bytes(work: Callable[[], object], *devices: torch.device) -> int | None:
    """Run ``work``; return the most memory in use meanwhile beyond what was in use before, in bytes.

    On GPUs this is what torch's allocator held for tensors, each one's peak added up. On a CPU under Linux it is the
    process's resident memory, after pages of freed tensors were given back where the C library can (glibc). None where
    the system does not tell.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        before = 0
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
            before += int(torch.cuda.memory_allocated(gpu))
        work()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus) - before
    _give_freed_pages_back()
    try:
        _CLEAR.write_text("5", encoding="ascii")  # resets the high-water mark (proc_pid_clear_refs(5))
        resident = _read("VmRSS")
    except OSError:
        work()
        return None
    work()
    peak = _read("VmHWM")
    return None if resident is None or peak is None else max(0, peak - resident)


def _give_freed_pages_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read(field: str) -> int | None:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # in kB
    return None


OUT_OF_MEMORY = "out of memory at batch size 1"
"""Why a sample fails that memory is too short for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )
