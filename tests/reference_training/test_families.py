"""Small models of other families: each is a checkpoint that the product loads, and depends on the seed alone."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from reference_training.data import easy_vqa_development_images, easy_vqa_training_images
from workers.models.checkpoint import BUNDLED_MODELS, fingerprint_checkpoint
from workers.runtime import SkipPlan, apply, describe

from . import train_families
from .families import FAMILIES
from .words import WordTraining

BACKBONES = {
    "qwen2-10": "qwen2",
    "phi-8": "phi",
    "olmo2-14": "olmo2",
    "gemma3-12": "gemma3_text",
    "captioner": "qwen2",
}


@pytest.fixture(scope="module")
def images():
    return easy_vqa_training_images()[:40], easy_vqa_development_images()[:4]


@pytest.fixture
def few_images(images, monkeypatch):
    training, development = images
    monkeypatch.setattr(train_families, "easy_vqa_training_images", lambda: training)
    monkeypatch.setattr(train_families, "easy_vqa_development_images", lambda: development)
    monkeypatch.setattr(train_families, "DEVELOPMENT_CAPTIONS", 50)


def tiny(name):
    """The family with its own settings, three layers of 16 wide behind one of the tower, and four steps."""
    own = FAMILIES[name]
    settings = {
        key: 8 if key in ("head_dim", "query_pre_attn_scalar") else v
        for key, v in own.architecture.text_settings.items()
    }
    sizes = {"text_width": 16, "text_layers": 3, "text_heads": 2, "text_inner": 16, "vision_layers": 1}
    architecture = replace(own.architecture, text_key_value_heads=None, text_settings=settings, **sizes)
    few = {"scenes": 2} if own.captions else {"easy_images": 2}
    phases = tuple(replace(phase, steps=4, warmup=1, save_every=2, **few) for phase in own.phases)
    return replace(own, architecture=architecture, phases=phases, words=own.words and WordTraining(2, batch=4))


def train(name, output, seed=0):
    train_families.train_family(tiny(name), output, seed)
    return output / "checkpoint"


def bundled_tower():
    bundled = LlavaForConditionalGeneration.from_pretrained(BUNDLED_MODELS / "llava-12", dtype=torch.float32)
    return bundled.model.vision_tower.state_dict()


def test_every_family_is_tried():
    assert FAMILIES.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_checkpoint_of_its_own_kind_that_takes_every_action(name, few_images, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(train(name, tmp_path), dtype=torch.float32)
    assert model.config.text_config.model_type == BACKBONES[name]
    assert FAMILIES[name].architecture.text_layers in range(8, 17)
    assert describe(model).refusals == ({}, {}, {})
    tokens = torch.tensor([[1, *[model.config.image_token_id] * 64, 5, 6, 7]])
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        dense = model(input_ids=tokens, pixel_values=pixels).logits
        for plan in ("RSR", "RFR", "RBR"):
            with apply(model, SkipPlan.parse(plan)):
                changed = model(input_ids=tokens, pixel_values=pixels).logits
            assert changed.isfinite().all() and not torch.equal(changed, dense)


def test_training_depends_on_the_seed_alone_and_can_be_interrupted(few_images, tmp_path, monkeypatch):
    whole = fingerprint_checkpoint(train("qwen2-10", tmp_path / "whole"))
    assert fingerprint_checkpoint(train("qwen2-10", tmp_path / "other", seed=1)) != whole
    with monkeypatch.context() as patched:
        save = train_families.save_checkpoint

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        patched.setattr(train_families, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train("qwen2-10", tmp_path / "stopped")
    assert fingerprint_checkpoint(tmp_path / "stopped" / "checkpoint") != whole
    assert fingerprint_checkpoint(train("qwen2-10", tmp_path / "stopped")) == whole


def test_the_tower_is_the_first_layers_of_the_bundled_one_and_stays_where_no_words_are_taught(few_images, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(train("captioner", tmp_path), dtype=torch.float32)
    expected = bundled_tower()
    own = model.model.vision_tower.state_dict()
    assert all(torch.equal(expected[name].bfloat16().float(), weight) for name, weight in own.items())
    assert {name.split(".")[2] for name in own if name.startswith("encoder.layers")} == {"0"}


def test_scaled_norms_start_at_one_over_the_root_of_the_layer():
    processor = train_families.reference_processor()
    layers = train_families.untrained(FAMILIES["qwen2-10"], processor, 0).model.language_model.layers
    gains = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in layers]
    assert [gain.min().item() for gain, _ in gains] == pytest.approx([1, *(n**-0.5 for n in range(2, 11))])
    assert all(torch.equal(first, second) and first.min() == first.max() for first, second in gains)


def test_a_finished_model_is_left_as_it_is(few_images, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(train_families.FAMILIES, "phi-8", tiny("phi-8"))
    arguments = ["phi-8", "--output", str(tmp_path)]
    assert train_families.main(arguments) == 0
    written = (tmp_path / "phi-8" / train_families.RESULT).read_text()
    weights = (tmp_path / "phi-8" / "checkpoint" / "model.safetensors").stat()
    assert train_families.main(arguments) == 0
    assert (tmp_path / "phi-8" / "checkpoint" / "model.safetensors").stat() == weights
    assert fingerprint_checkpoint(tmp_path / "phi-8" / "checkpoint") in written
    assert caplog.messages[-1].startswith("phi-8: accuracy ")


def test_an_unknown_name_is_refused_by_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_families.main(["gpt-5"])
    assert "no model is named gpt-5; there are qwen2-10, phi-8" in capsys.readouterr().err
