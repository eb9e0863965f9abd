"""What engines read of a written checkpoint besides its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_llava
import tiny_video_families
import torch
from export_builders import document
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from optimizer.exports.writing import export_plan
from workers.messages import ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan, apply


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA as transformers 5 saves it, its tokenizer putting <s> first, which its chat template does not say."""
    directory = tmp_path_factory.mktemp("models") / "starting"
    processor = tiny_llava.build_processor()
    start = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    model = tiny_llava.build_model(processor)
    model.config.text_config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "vllm"
    return export_plan(document("RSRRSR", source), ModelSource(str(source)), "vllm", output).directory


def names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_tensors_have_the_hubs_names_whatever_the_models_directory_has(source: Path, written: Path) -> None:
    assert "vision_tower.embeddings.patch_embedding.weight" in names(source)  # transformers since 5.6
    found = names(written)
    assert {
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "language_model.model.layers.3.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.weight",
    } <= found
    assert not any(name.startswith(("model.", "vision_tower.e")) for name in found)


def test_settings_stand_under_their_names_before_and_since_transformers_5(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5000.0
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    images = json.loads((written / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor" and images["crop_size"] == {"height": 32, "width": 32}
    assert json.loads((written / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_rotary_sections_that_transformers_interleaves_unasked_are_said_to_be(tmp_path: Path) -> None:
    """Engines take the sections one behind the other unless `config.json` says otherwise, as the hub's does."""
    model = tiny_video_families.save(tmp_path / "model", "qwen3_vl")
    before = json.loads((model / "config.json").read_text())["text_config"]["rope_parameters"]
    assert "mrope_interleaved" not in before
    written = export_plan(
        document("RRSRRR", model), ModelSource(str(model)), "checkpoint", tmp_path / "export"
    ).directory
    text = json.loads((written / "config.json").read_text())["text_config"]
    assert text["rope_parameters"] == before | {"mrope_interleaved": True}
    assert text["rope_scaling"]["mrope_interleaved"] is True
    other = tiny_video_families.save(tmp_path / "other", "qwen2_vl")
    plain = export_plan(document("RRSRRR", other), ModelSource(str(other)), "checkpoint", tmp_path / "plain").directory
    assert "mrope_interleaved" not in (plain / "config.json").read_text()


def test_llama_cpp_is_told_how_a_tokenizer_like_sentencepiece_begins_a_text(tmp_path: Path) -> None:
    """Silent files would mean a space and <s> before every text, and one score for all tokens."""
    model = tiny_video_families.save(tmp_path / "model", "smolvlm", letters=True)
    (model / "tokenizer.model").write_bytes(b"scores")
    written = export_plan(document("RSRRSR", model), ModelSource(str(model)), "llama-cpp", tmp_path / "gguf").directory
    settings = json.loads((written / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False and settings["add_prefix_space"] is False
    tokenizer = AutoTokenizer.from_pretrained(model)
    listed = {int(number): token["content"] for number, token in settings["added_tokens_decoder"].items()}
    assert listed[tokenizer.convert_tokens_to_ids("<image>")] == "<image>"
    assert listed[tokenizer.convert_tokens_to_ids("<row_2_col_1>")] == "<row_2_col_1>"
    assert (written / "tokenizer.model").read_bytes() == b"scores"


def test_the_chat_template_says_the_token_that_the_tokenizer_puts_first(source: Path, written: Path) -> None:
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    before, after = AutoProcessor.from_pretrained(source), AutoProcessor.from_pretrained(written)
    assert before.apply_chat_template(turn, tokenize=False).startswith("USER")
    assert after.apply_chat_template(turn, tokenize=False).startswith("<s>USER")


def test_a_checkpoint_for_transformers_keeps_its_template(source: Path, tmp_path: Path) -> None:
    """Rendered to text and given to the processor, as many scripts do, the prompt is the model's, with one <s>."""
    written = export_plan(document("RSRRSR", source), ModelSource(str(source)), "checkpoint", tmp_path / "plain")
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    picture = torch.zeros((3, 40, 60), dtype=torch.uint8)
    asked = []
    for processor in (AutoProcessor.from_pretrained(source), AutoProcessor.from_pretrained(written.directory)):
        text = processor.apply_chat_template(turn, tokenize=False)
        asked.append(processor(images=[picture], text=[text], return_tensors="pt")["input_ids"].tolist())
    assert asked[0] == asked[1]


def test_transformers_reads_what_the_model_was(source: Path, written: Path) -> None:
    loaded = load_model(ModelSource(str(source)), device="cpu")
    model, processor = AutoModelForImageTextToText.from_pretrained(written), AutoProcessor.from_pretrained(written)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    picture = torch.randint(0, 255, (3, 40, 60), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    asked = [
        each(images=[picture], text=[each.apply_chat_template(turn, tokenize=False)], return_tensors="pt", **options)
        for each, options in ((loaded.processor, {}), (processor, {"add_special_tokens": False}))
    ]
    assert asked[0]["input_ids"].tolist() == asked[1]["input_ids"].tolist()
    with torch.no_grad():
        with apply(loaded.model, SkipPlan.parse("RSRRSR")):
            expected = loaded.model(**asked[0]).logits
        assert torch.equal(model.eval()(**asked[1]).logits, expected)
