"""Pruned checkpoints as files: complete or absent, processor included. What they compute is tested in families/."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import build_model, build_processor
from torch.ao.quantization import quantize_dynamic
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from workers.runtime import PlanError, SkipPlan, apply, apply_permanently, save_pruned

PLAN = SkipPlan.parse("SRRSRR")


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    return build_model(processor)


def ask(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> torch.Tensor:
    picture = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    inputs = processor(images=[picture], text=["USER: <image>\nwhat shape? ASSISTANT:"], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_model_generation_config_and_processor_travel_together(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    model.generation_config.max_new_tokens = 7
    directory = save_pruned(model, PLAN, tmp_path / "pruned", processor=processor)
    reloaded = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    reloaded_processor = AutoProcessor.from_pretrained(directory)
    with apply(model, PLAN):
        expected = ask(model, processor)
    assert torch.equal(ask(reloaded, reloaded_processor), expected)
    assert reloaded.generation_config.max_new_tokens == 7
    assert reloaded_processor.chat_template == processor.chat_template
    assert reloaded.config.text_config.num_hidden_layers == 4


def test_a_permanent_plan_saves_as_the_pruned_checkpoint_does_but_for_the_hubs_names(
    processor: LlavaProcessor, tmp_path: Path
) -> None:
    whole, cut = build_model(processor), build_model(processor)
    save_pruned(whole, PLAN, tmp_path / "pruned")
    apply_permanently(cut, PLAN)
    cut.save_pretrained(tmp_path / "cut")
    assert (tmp_path / "cut/config.json").read_bytes() == (tmp_path / "pruned/config.json").read_bytes()
    own, hub = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "pruned"))
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in own.items()}
    assert renamed.keys() == hub.keys() != own.keys()
    assert all(torch.equal(tensor, hub[name]) for name, tensor in renamed.items())


def test_a_directory_with_something_in_it_is_left_alone(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        save_pruned(model, PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("text", ["SRRSRR", "RRRRRR"])
def test_a_model_that_was_quantised_in_memory_is_refused_and_stays_whole(
    processor: LlavaProcessor, tmp_path: Path, text: str
) -> None:
    """Its weights are packed: no tensors, which only pickles hold. People keep such models so."""
    whole = build_model(processor)
    quantize_dynamic(whole.model.language_model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    model = pickle.loads(pickle.dumps(whole))
    expected = ask(model, processor)
    with pytest.raises(PlanError, match=r"differently|cannot save the LlavaForConditionalGeneration"):
        save_pruned(model, SkipPlan.parse(text), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(ask(model, processor), expected)


def test_a_failed_save_leaves_no_directory_and_the_model_whole(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    class Unsaved:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError("disk full")

    before = ask(model, processor)
    with pytest.raises(OSError, match="disk full"):
        save_pruned(model, PLAN, tmp_path / "pruned", processor=Unsaved())
    assert not list(tmp_path.iterdir())
    assert torch.equal(ask(model, processor), before)


def test_a_model_that_transformers_would_load_differently_is_not_cut(processor: LlavaProcessor, tmp_path: Path) -> None:
    odd = build_model(processor)
    odd.model.language_model.layers[2].self_attn.scaling = 0.25  # nothing in the configuration says so
    before = ask(odd, processor)
    with pytest.raises(PlanError, match=r"layer 1 .*scaling"):
        save_pruned(odd, PLAN, tmp_path / "pruned")
    with pytest.raises(PlanError, match=r"layer 1 .*scaling"):
        apply_permanently(odd, PLAN)
    assert not list(tmp_path.iterdir())
    assert torch.equal(ask(odd, processor), before)


def rename_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if "o_proj" in name)
    tensors[name.replace("o_proj", "out")] = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_a_value(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if "o_proj" in name).view(-1)[3] += 1e-3
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def cut_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if "o_proj" in name)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_the_positions(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 7.0
    (directory / "config.json").write_text(json.dumps(config))


def truncate_the_weights(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_a_tensor, r"1 missing keys, such as \S*o_proj"),
        (change_a_value, r"\S*o_proj\S* .*other values"),
        (cut_a_tensor, r"could not load|mismatched|shape"),
        (change_the_positions, "other logits"),
        (truncate_the_weights, "could not load"),
    ],
)
def test_what_was_written_is_read_back_before_it_appears(
    damage: Callable[[Path], None], message: str, processor: LlavaProcessor, tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever a library writes: tensors under other names, other values, a configuration that says another thing."""
    model = build_model(processor)
    before, write = ask(model, processor), type(model).save_pretrained

    def save(model: LlavaForConditionalGeneration, directory: Path, **options: Any) -> None:
        write(model, directory, **options)
        damage(directory)

    monkeypatch.setattr(type(model), "save_pretrained", save)
    with pytest.raises(PlanError, match=message) as caught:
        save_pruned(model, PLAN, tmp_path / "pruned", processor=processor)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert torch.equal(ask(model, processor), before)


def test_an_empty_directory_is_filled_and_an_unfinished_one_never_seen(
    model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    target = tmp_path / "pruned"
    target.mkdir()

    class Looking:
        def save_pretrained(self, directory: Path) -> None:
            assert not list(target.iterdir())

    save_pruned(model, PLAN, target, processor=Looking())
    assert (target / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_saving_leaves_a_model_that_is_being_trained_as_it_is(processor: LlavaProcessor, tmp_path: Path) -> None:
    model = build_model(processor).train()
    model.model.vision_tower.eval()
    attributes = [dict(vars(module)) for module in model.modules()]
    save_pruned(model, PLAN, tmp_path / "pruned")
    assert all(vars(module) == own for module, own in zip(model.modules(), attributes, strict=True))
