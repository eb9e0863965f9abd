"""Checkpoints of the tiny LLaVA with quantised decoder weights, written by hand.

The formats are those of compressed-tensors, for `fp8-blocks` that of DeepSeek's and Qwen's checkpoints, and those of
GPTQ (Frantar et al. 2023, as AutoGPTQ stores it) and AWQ (Lin et al. 2024, as AutoAWQ's `gemm` stores it).

Nothing of compressed-tensors is imported: the formats' own definitions are what is written, and `dequantised` is the
same arithmetic read backwards, in a checkpoint of plain weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny_llava
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMATS = ("int8", "fp8", "w4a16", "int8-dynamic", "fp8-blocks")
GROUP, BLOCK = 16, 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns a word of AWQ holds, from its lowest four bits on."""
IGNORED = ("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")


def save(directory: Path, kind: str, *, ignore: tuple[str, ...] = (), seed: int = 0) -> tuple[Path, Path]:
    """Write the quantised checkpoint and the dequantised one into folders of ``directory``; return both."""
    quantised, plain = directory / kind, directory / f"{kind}-dequantised"
    processor = tiny_llava.build_processor()
    model = tiny_llava.build_model(processor, seed=seed).to(
        torch.float16 if kind in ("gptq", "awq") else torch.bfloat16
    )
    for folder in (quantised, plain):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    tensors, dense = load_file(quantised / "model.safetensors"), {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        linear = ".layers." in name and name.endswith("proj.weight") and "vision" not in name
        if not linear or any(part in module for part in ignore):
            stored[name] = dense[name] = tensor
            continue
        parts, dense[name] = _quantise(tensor, kind)
        stored |= {f"{module}.{part}": value for part, value in parts.items()}
    save_file(
        {name: each.contiguous() for name, each in stored.items()},
        quantised / "model.safetensors",
        metadata={"format": "pt"},
    )
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = _config(kind, [*IGNORED, *(f"re:.*{part}.*" for part in ignore)])
    (quantised / "config.json").write_text(json.dumps(config, indent=2))
    return quantised, plain


def _quantise(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Parts that are stored of a weight ``[out, in]``, and the weight that they stand for, in float32."""
    if kind == "w4a16":
        grouped = weight.float().unflatten(1, (-1, GROUP))
        scale = (grouped.abs().amax(-1) / 7.5).bfloat16()  # [out, in / GROUP]
        whole = (grouped / scale.float()[..., None]).round().clamp(-8, 7)
        words = _packed(whole.flatten(1) + 8)
        dense = (whole * scale.float()[..., None]).flatten(1)
        return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, dense
    if kind == "fp8-blocks":
        blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
        inverse = blocks.abs().amax((1, 3)) / 448.0
        small = (blocks / inverse[:, None, :, None]).to(torch.float8_e4m3fn)
        dense = (small.float() * inverse[:, None, :, None]).reshape(weight.shape)
        return {"weight": small.reshape(weight.shape), "weight_scale_inv": inverse}, dense
    if kind in ("gptq", "awq"):
        return _in_columns(weight, kind)
    limit = 448.0 if kind == "fp8" else 127.0
    scale = (weight.float().abs().amax(1, keepdim=True) / limit).bfloat16()
    whole = (weight.float() / scale.float()).clamp(-limit, limit)
    whole = whole.to(torch.float8_e4m3fn) if kind == "fp8" else whole.round().to(torch.int8)
    return {"weight": whole, "weight_scale": scale}, whole.float() * scale.float()


def _in_columns(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of a weight ``[out, in]`` with a zero point a group, stored by input: GPTQ packs rows, AWQ columns."""
    grouped = weight.float().T.unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, out]
    low, high = grouped.amin(1), grouped.amax(1)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15)  # GPTQ stores one less
    whole = (grouped / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15)
    dense = ((whole - zero[:, None]) * scale.float()[:, None]).flatten(0, 1).T.contiguous()
    numbers = whole.flatten(0, 1)  # [in, out]
    if kind == "gptq":
        places = torch.arange(numbers.shape[0], dtype=torch.int32) // GROUP
        return {"qweight": _packed(numbers.T).T, "qzeros": _packed(zero - 1), "scales": scale, "g_idx": places}, dense
    return {"qweight": _packed(numbers, AWQ_ORDER), "qzeros": _packed(zero, AWQ_ORDER), "scales": scale}, dense


def _packed(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack eight numbers of four bits of the last dimension into a word, in an order, lowest bits first."""
    words = (numbers.long().unflatten(-1, (-1, 8))[..., list(order)] << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _config(kind: str, ignore: list[str]) -> dict[str, object]:
    if kind == "fp8-blocks":
        names = [name.removeprefix("re:.*").removesuffix(".*") for name in ignore]
        blocks = {"activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": names}
        return {"quant_method": "fp8", **blocks}
    if kind == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": False,
            "backend": "gptq_torch",
        }
    if kind == "awq":
        names = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
        settings = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", "backend": "torch_awq"}
        return {"quant_method": "awq", **settings, "modules_to_not_convert": names}
    weights: dict[str, object] = {
        "num_bits": 4 if kind == "w4a16" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "group" if kind == "w4a16" else "channel",
        "group_size": GROUP if kind == "w4a16" else None,
        "dynamic": False,
    }
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    layout = {"w4a16": "pack-quantized", "fp8": "float-quantized"}.get(kind, "int-quantized")
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": layout,
                "weights": weights,
                "input_activations": dynamic if kind == "int8-dynamic" else None,
                "output_activations": None,
            }
        },
    }
