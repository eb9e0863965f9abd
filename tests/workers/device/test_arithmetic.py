"""Which number formats a device computes in, by the flags of processors that are known."""

from __future__ import annotations

import pytest
import torch

from workers.device.arithmetic import emulates, slow_arithmetic

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ZEN_2 = {"avx2": True, "fma3": True, "f16c": True, "avx512_bf16": False, "avx512_fp16": False, "l2_cache_size": 524288}
ZEN_4 = {"avx2": True, "avx512_f": True, "avx512_bf16": True, "avx512_fp16": False, "amx_bf16": False}
SAPPHIRE_RAPIDS = {"avx2": True, "avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True, "amx_fp16": False}
CORTEX_A72 = {"neon": True, "fp16_arith": False, "bf16": False, "sve": False}
NEOVERSE_N1 = {"neon": True, "fp16_arith": True, "bf16": False, "sve": False}
NEOVERSE_V1 = {"neon": True, "fp16_arith": True, "bf16": True, "sve": True, "sve_max_length": 256}


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16"),
    [
        ({}, True, True),
        (ZEN_2, True, True),
        (ZEN_4, False, True),
        (SAPPHIRE_RAPIDS, False, False),
        (CORTEX_A72, True, True),
        (NEOVERSE_N1, True, False),
        (NEOVERSE_V1, False, False),
    ],
)
def test_a_cpu_emulates_what_it_has_no_instructions_for(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], bfloat16: bool, float16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert (emulates(torch.bfloat16, CPU), emulates(torch.float16, CPU)) == (bfloat16, float16)
    assert not emulates(torch.float32, CPU) and not emulates(torch.float64, CPU)
    assert bool(slow_arithmetic(torch.bfloat16, CPU)) is bfloat16


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_emulates_bfloat16_where_torch_says_so(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or supported)
    assert emulates(torch.bfloat16, GPU) is not supported
    assert not emulates(torch.float16, GPU) and not emulates(torch.float32, GPU)
