"""The shipped checkpoint: what it is, how big it is, and that it does its two tasks through the Auto classes."""

import json
from pathlib import Path

import pytest
import torch
from reference_training.data import CAPTION_PROMPTS
from reference_training.evaluate import Accuracy, easy_vqa_questions, main, measure, scene_questions, text_questions
from reference_training.packing import Packer
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from workers.tasks.rendered import is_reserved
from workers.tasks.scenes import scene

CHECKPOINT = Path(__file__).parents[3] / "configs" / "reference" / "llava-12"
LARGEST_BYTES = 16_000_000


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="auto").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


def test_it_is_a_plain_llava_of_twelve_layers_in_bfloat16(model):
    assert type(model) is LlavaForConditionalGeneration
    assert len(model.model.language_model.layers) == model.config.text_config.num_hidden_layers == 12
    assert model.config.text_config.hidden_size == 192
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_it_fits_the_size_limit():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= LARGEST_BYTES


def test_every_weight_of_the_file_is_used_and_none_is_missing():
    _, report = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_an_image_is_sixty_four_vision_tokens(model, processor):
    assert processor.image_processor.size == {"height": 64, "width": 64}
    prompt = "USER: <image>\ndescribe the image ASSISTANT:"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the image"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt
    inputs = processor(images=scene(0, 0).image, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert int((inputs["input_ids"] == processor.tokenizer.bos_token_id).sum()) == 1


def test_generation_ends_and_pads_by_itself(model, processor):
    settings = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert settings["eos_token_id"] == processor.tokenizer.eos_token_id
    assert settings["pad_token_id"] == processor.tokenizer.pad_token_id
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPTS[0]}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=scene(1_000_000, 0).image, text=prompt, return_tensors="pt").to(model.dtype)
    generated = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert generated[-1] == processor.tokenizer.eos_token_id and len(generated) < 32


def test_training_prompts_are_the_shipped_processors(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a circle?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=scene(0, 0).image, text=prompt)["input_ids"][0]
    packer = Packer(processor, 64)
    branch = packer.branch("is there a circle?", "yes")
    assert [*packer.prefix, *branch.tokens[: -branch.answer_length]] == list(inputs)


def test_it_answers_held_out_questions_and_captions(processor):
    """Far below the measured accuracy, which takes minutes; the measuring command is in the model card."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()  # faster on many CPUs
    assert measure(model, processor, easy_vqa_questions(limit=12)).share >= 0.85
    assert measure(model, processor, scene_questions(60, seed=0)).share >= 0.75


def test_the_wilson_interval_is_the_published_one():
    """Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), interval in published.items():
        assert Accuracy(right, n).interval == pytest.approx(interval, abs=6e-5)


def test_a_directory_without_a_checkpoint_is_named(tmp_path, capsys):
    assert main(["--model", str(tmp_path)]) == 2
    assert f"{tmp_path}: no config.json there" in capsys.readouterr().err


def test_measuring_nothing_is_an_error(model, processor):
    with pytest.raises(ValueError, match="nothing to measure"):
        measure(model, processor, iter([]))


def test_reserved_texts_are_those_that_training_never_drew():
    everything, reserved = (list(text_questions(300, 0, reserved=only)) for only in (False, True))
    assert len(everything) == 300
    expected = [asked.answer for asked in everything if asked.answer.isdigit() and is_reserved(int(asked.answer))]
    assert [asked.answer for asked in reserved] == expected and expected
