"""Find out whether this machine's CPU multiplies bfloat16 natively or emulates it."""

from __future__ import annotations

import torch

MULTIPLIES_BFLOAT16 = ("avx512_bf16", "avx10_2", "amx_bf16", "bf16", "sve_bf16")
"""Names in ``torch.cpu.get_capabilities()`` of instructions that multiply bfloat16: of x86 the first three."""

EMULATED = "this CPU has no bfloat16 arithmetic (no AVX512-BF16, no AMX) and emulates it"
FASTER = "model.dtype: float32 is much faster here"


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 numbers, as torch sees it."""
    there = torch.cpu.get_capabilities()
    return any(there.get(name) is True for name in MULTIPLIES_BFLOAT16)


def slow_arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """Return a hint about a dtype that this CPU emulates; empty where it does not, or where the CPU is not used."""
    if dtype != torch.bfloat16 or device.type != "cpu" or multiplies_bfloat16():
        return ""
    return f"{EMULATED}: {FASTER}"
