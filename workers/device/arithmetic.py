"""Find out in which number formats a device multiplies by instructions of its own, and which it emulates."""

from __future__ import annotations

import torch

CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "avx10_2", "amx_fp16", "fp16_arith"),
}
"""Names in ``torch.cpu.get_capabilities()`` of instructions that multiply a format: of x86 the first three."""


def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has no instructions for products of such numbers, as torch sees it."""
    if device.type == "cuda":
        return dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or dtype not in CPU_INSTRUCTIONS:
        return False
    there = torch.cpu.get_capabilities()
    return not any(there.get(name) is True for name in CPU_INSTRUCTIONS[dtype])


def slow_arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """Return a hint about a dtype that this device emulates; empty where it does not."""
    if not emulates(dtype, device):
        return ""
    return f"the device has no {dtype_name(dtype)} arithmetic and emulates it: model.dtype: float32 is much faster here"


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as the job file does, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
