from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llava
import torch
from safetensors.torch import load_file, save_file

from workers.cluster import handler
from workers.cluster.settings import WorkerSettings
from workers.errors import ModelError
from workers.messages import ModelSource
from workers.models.checkpoint import canonical_config, find_checkpoint, fingerprint_checkpoint
from workers.models.loading import LoadedModel, choose_device, load_model
from workers.models.prompts import build_inputs
from workers.runtime.descriptor import UnsupportedFamilyError
from workers.tasks import Task


@pytest.fixture
def copy(tiny_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


def refused(directory: Path | str, message: str, **options: object) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSource(str(directory), device="cpu", **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_directory_is_loaded_for_inference(tiny: LoadedModel, tiny_directory: Path) -> None:
    assert not tiny.model.training
    assert tiny.processor.tokenizer.padding_side == "left"
    assert tiny.parameters == sum(t.numel() for t in load_file(tiny_directory / "model.safetensors").values())


def test_dtype_and_attention_are_taken_from_the_source(tiny_directory: Path) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), dtype="bfloat16", attention="eager", device="cpu"))
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("named", [True, False])
def test_auto_computes_in_float32_where_the_checkpoints_own_dtype_is_emulated(
    tmp_path: Path, small_task: Task, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    directory = tmp_path / "model"
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).bfloat16().save_pretrained(directory)
    processor.save_pretrained(directory)
    if not named:  # as in some published configurations: the weights say what the dtype is
        config = json.loads((directory / "config.json").read_text())
        for section in (config, config["text_config"], config["vision_config"]):
            section.pop("dtype", None)
        (directory / "config.json").write_text(json.dumps(config))

    def worker(dtype: str, **flags: bool) -> handler.Handler:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | flags)
        source = ModelSource(str(directory), dtype=dtype, device="cpu")
        return handler.Handler.load(source, small_task, WorkerSettings(0))

    emulated, told, native = worker("auto"), worker("float32"), worker("auto", avx512_bf16=True)
    assert (emulated.info.dtype, told.info.dtype, native.info.dtype) == ("float32", "float32", "bfloat16")
    # The same evaluations, bit for bit and on record: what is said of the worker differs in the hint alone.
    assert replace(emulated.info, hint="") == told.info
    assert emulated.info.hint == "model.dtype: auto is float32 here: the device would emulate the checkpoint's bfloat16"
    assert native.info.hint == ""
    assert "model.dtype: float32 is much faster here" in worker("bfloat16").info.hint
    ours, theirs = emulated.loaded.model.state_dict(), told.loaded.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What is exported keeps the checkpoint's own dtype on every machine.
    assert load_model(ModelSource(str(directory), device="cpu")).model.dtype == torch.bfloat16


def test_the_fingerprint_sees_weights_and_config_but_not_their_packing(tiny: LoadedModel, copy: Path) -> None:
    assert fingerprint_checkpoint(copy) == tiny.fingerprint
    # Other shards, another version of the program that saved it: the same model.
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=7))
    assert fingerprint_checkpoint(copy) == tiny.fingerprint
    # One weight, or one setting, and it is another.
    tensors[names[0]].view(-1)[0] += 1
    save_file({name: tensors[name] for name in shards["a.safetensors"]}, copy / "a.safetensors")
    changed = fingerprint_checkpoint(copy)
    (copy / "config.json").write_text(json.dumps(config | {"image_seq_length": 17}))
    assert len({tiny.fingerprint, changed, fingerprint_checkpoint(copy)}) == 3


def test_the_fingerprint_sees_names_dtypes_and_shapes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensor = torch.arange(6, dtype=torch.float32)
    found = set()
    for tensors in ({"a": tensor}, {"b": tensor}, {"a": tensor.view(torch.int32)}, {"a": tensor.view(2, 3)}):
        save_file(tensors, tmp_path / "model.safetensors")  # the same 24 bytes each time
        found.add(fingerprint_checkpoint(tmp_path))
    assert len(found) == 4


def test_volatile_fields_are_left_out_at_any_depth() -> None:
    config = {"b": {"transformers_version": "5", "x": 1}, "a": [{"_name_or_path": "y"}], "dtype": "bfloat16"}
    assert canonical_config(config) == '{"a":[{}],"b":{"x":1},"dtype":"bfloat16"}'


def test_missing_models_are_named_with_what_there_is(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: no such directory, nor a bundled model")
    refused("llava-13", "llava-13: no such directory.* a hub id has the form owner/name")
    file = tmp_path / "file"
    file.touch()
    refused(file, "is a file; give the directory")
    refused(tmp_path, "has no config.json")


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="and the hub cannot be reached"):
        find_checkpoint(ModelSource("nobody/no-such-model"))


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, r"has no model\.safetensors")
    torch.save({}, copy / "pytorch_model.bin")
    refused(copy, r"only pickled weights \(pytorch_model\.bin\)")
    refused(copy, r"only pickled weights", allow_pickle=("other.bin",))


def test_pickled_weights_are_read_where_they_are_allowed_by_name(copy: Path, tiny: LoadedModel) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    allowed = ModelSource(str(copy), device="cpu", allow_pickle=("pytorch_model.bin",))
    assert load_model(allowed).fingerprint == tiny.fingerprint  # safetensors go first
    (copy / "model.safetensors").unlink()
    loaded = load_model(allowed)
    expected = tiny.model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.fingerprint != tiny.fingerprint


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_code_in_allowed_pickled_weights_is_not_run(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save({**tensors, "exploit": Exploit(tmp_path / "ran")}, copy / "pytorch_model.bin")
    refused(copy, "cannot be loaded", allow_pickle=("pytorch_model.bin",))
    assert not (tmp_path / "ran").exists()
    torch.load(copy / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the exploit would have worked


def test_an_index_cannot_name_files_elsewhere(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "names a file outside the directory")


@pytest.mark.parametrize("damage", ["truncated", "no header", "no file of an index"])
def test_corrupt_weights_are_named(copy: Path, damage: str) -> None:
    weights = copy / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(copy, r"model\.safetensors is corrupt: it has \d+ bytes where its header says \d+")
    elif damage == "no header":
        weights.write_bytes(b"\xff" * 100)
        refused(copy, r"model\.safetensors is corrupt: its header has an impossible length")
    else:
        weights.unlink()
        (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
        refused(copy, "weight file gone.safetensors is missing")


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    gone = next(name for name in tensors if "layers.3.mlp.up_proj" in name)
    del tensors[gone]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, r"1 weights are missing .*layers\.3\.mlp\.up_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_type"}, "config.json is not usable"),
        ({"model_type": "llama"}, "architecture 'llama' is no image-text-to-text model"),
    ],
)
def test_unsupported_architectures_are_named(copy: Path, change: dict[str, str], message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    refused(copy, message)
    (copy / "config.json").write_text("{")
    refused(copy, "config.json cannot be read")


def test_a_family_the_runtime_does_not_understand_is_a_model_error(
    tiny_directory: Path, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object) -> None:
        raise UnsupportedFamilyError("no list of decoder layers was found")

    monkeypatch.setattr(handler, "describe", refuse)
    with pytest.raises(ModelError, match=f"model {tiny_directory}: no list of decoder layers was found"):
        handler.Handler.load(ModelSource(str(tiny_directory), device="cpu"), small_task, WorkerSettings(0))


def test_a_clock_in_the_generation_settings_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"max_time": 0.5}))
    refused(copy, "max_time in its generation settings lets a clock decide")


def test_bad_settings_are_named(tiny_directory: Path) -> None:
    refused(tiny_directory, "dtype 'float99' is no torch dtype", dtype="float99")
    with pytest.raises(ModelError, match="none of auto, cpu, cuda"):
        choose_device("tpu")


def test_prompts_go_through_the_chat_template_padded_on_the_left(tiny: LoadedModel, small_task: Task) -> None:
    samples = sorted(small_task.search, key=lambda sample: len(sample.question))
    samples = [samples[0], samples[-1]]
    inputs = build_inputs(tiny.processor, small_task.spec, samples, [sample.image.open() for sample in samples])
    pad = tiny.processor.tokenizer.pad_token_id
    short, long = inputs["input_ids"].tolist()
    assert short[0] == pad and long[0] != pad and short[-1] != pad
    assert inputs["attention_mask"][0].tolist() == [int(token != pad) for token in short]
    for row, sample in zip((short, long), samples, strict=True):
        assert row.count(tiny.processor.image_token_id) == tiny_llava.VISION_TOKENS
        text = tiny.processor.tokenizer.decode(row, skip_special_tokens=True)
        assert text.split() == f"USER: {sample.question} ASSISTANT:".split()


def test_without_a_chat_template_the_task_says_the_prompt(small_task: Task) -> None:
    processor = tiny_llava.build_processor(chat_template=None)
    sample = small_task.search[0]
    inputs = build_inputs(processor, small_task.spec, [sample], [sample.image.open()])
    text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert text == f"\n{sample.question}"
    assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == tiny_llava.VISION_TOKENS
