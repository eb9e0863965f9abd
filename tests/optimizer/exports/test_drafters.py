"""Exports that draft for the dense model, in transformers; in engines: test_in_engines.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import tiny_video_families
import torch
from export_builders import document
from PIL import Image
from transformers import AutoModelForImageTextToText

from optimizer.errors import UsageFault
from optimizer.exports.formats.drafter_loader import load_drafter
from optimizer.exports.verification import Verification, verify_export
from optimizer.exports.writing import export_plan
from workers.engines.interface import Serving
from workers.engines.vllm import arguments
from workers.messages import ModelSource
from workers.models.without_torchvision import load_auto_processor

TOKENS, DRAFT_LENGTH = 12, 5


def asked(directory: Path) -> tuple[Any, Any]:
    """The model, and inputs of a prompt with an image, by the processor as it is."""
    processor = load_auto_processor(directory)
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    turn = [{"type": "image", "image": picture}, {"type": "text", "text": "what shape is green?"}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": turn}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return AutoModelForImageTextToText.from_pretrained(directory).eval(), inputs


def passes(dense: Any, inputs: Any, drafter: Any) -> int:
    """Passes of the dense model for an answer of ``TOKENS`` tokens, which must be its own."""
    own = drafter.generation_config
    own.num_assistant_tokens, own.num_assistant_tokens_schedule = DRAFT_LENGTH, "constant"
    own.assistant_confidence_threshold = 0.0
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    expected = dense.generate(**inputs, **options)
    counted: list[None] = []
    hook = dense.register_forward_pre_hook(lambda *_: counted.append(None))
    try:
        found = dense.generate(**inputs, **options, assistant_model=drafter)
    finally:
        hook.remove()
    assert torch.equal(found, expected)
    return len(counted)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm", "internvl", "gemma3"])
def test_a_drafter_that_is_the_dense_model_has_every_draft_kept(family: str, tmp_path: Path):
    """It sees what the dense model sees."""
    if family == "llava":
        directory = tiny_llava.save(tmp_path / "model")
    else:
        directory = tiny_video_families.save(tmp_path / "model", family)
    dense, inputs = asked(directory)
    dense.generation_config.eos_token_id = None
    assert passes(dense, inputs, load_drafter(directory)) == math.ceil(TOKENS / (DRAFT_LENGTH + 1))
    if family == "llava":  # as transformers loads it, it does not see the image
        blind = AutoModelForImageTextToText.from_pretrained(directory).eval()
        assert passes(dense, inputs, blind) > TOKENS / 2


@pytest.fixture(scope="module")
def drafter_export(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "drafter"
    plan = document("RSRRSR", model_directory)
    return export_plan(plan, ModelSource(str(model_directory)), "drafter", output).directory


def test_the_dense_model_answers_as_alone_with_it_in_a_fresh_process(drafter_export: Path, model_directory: Path):
    found = verify_export(drafter_export, ModelSource(str(model_directory)), samples=2)
    assert isinstance(found, Verification) and found.passed and len(found.answers) == 2, found
    (note,) = found.notes
    assert note.startswith("the dense model passed ")


def test_its_card_names_the_dense_model_and_every_command(drafter_export: Path):
    card = (drafter_export / "README.md").read_text()
    assert 'dense = AutoModelForImageTextToText.from_pretrained("tiny")' in card
    assert "load_drafter()" in card and "--speculative-config" in card and "--spec-type draft-simple" in card
    assert "vision tower is a CLIP one" in card
    assert "are of the plan alone" in card and "more drafts may be refused" in card
    assert "`IndexError: The shape of the mask" in card  # of vLLM without the plug-in


def test_its_code_is_run_only_as_it_was_written(drafter_export: Path, model_directory: Path):
    file = drafter_export / "drafter.py"
    kept = file.read_text()
    try:
        file.write_text(kept + "import os\n")
        with pytest.raises(UsageFault, match=r"drafter\.py is not as it was written"):
            verify_export(drafter_export, ModelSource(str(model_directory)))
    finally:
        file.write_text(kept)


def test_vllm_is_told_of_it(drafter_export: Path):
    given = arguments(Path("dense"), Serving(drafter=drafter_export, draft_length=4), 1, "name")
    option = given[given.index("--speculative-config") + 1]
    assert option == f'{{"method": "draft_model", "model": "{drafter_export}", "num_speculative_tokens": 4}}'
