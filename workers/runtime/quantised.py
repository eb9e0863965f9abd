"""Tell models and modules whose weights are quantised, and have packed weights unpacked."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from torch import nn

UNPACKED = "compressed-tensors"
"""The method whose weights are plain ones once they are unpacked."""
SCHEME = "quantization_scheme"
"""What compressed-tensors sets on a module whose weights or activations it quantises."""


def quantisation_of(config: Any) -> str:
    """Name the method that a configuration's weights are quantised by, for example ``"fp8"``; empty for none."""
    for section in (config, getattr(config, "text_config", None)):
        if own := getattr(section, "quantization_config", None):
            settings = own if isinstance(own, dict) else own.to_dict()
            method = settings.get("quant_method", "unknown")
            return str(getattr(method, "value", method))
    return ""


def unpack(model: nn.Module) -> None:
    """Have compressed-tensors unpack the weights now, which it would do at the model's first call.

    From then on the model is what runs: layers can be called alone, and its tensors stay the same.
    """
    if hasattr(model, "ct_decompress_hook"):
        with without_progress_bars():
            model.hf_quantizer.compressor.decompress_model(model)  # type: ignore[union-attr, operator]


def is_quantised(module: nn.Module) -> bool:
    """Whether a plain module stands for quantised weights, or quantises what goes through it."""
    return getattr(module, SCHEME, None) is not None


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep progress bars of compressed-tensors and lines of gptqmodel, which nothing turns off, from the output."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
