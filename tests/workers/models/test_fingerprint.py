"""The fingerprint of a model sees every file and field that an answer may depend on, and no other."""

import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from workers.errors import ModelError
from workers.messages import ModelSource
from workers.models.checkpoint import BUNDLED_MODELS, check_checkpoint, fingerprint_checkpoint, weight_files
from workers.models.loading import load_model

VOLATILE = {"transformers_version", "_name_or_path", "_commit_hash"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model's files, with small weights."""
    ignore = shutil.ignore_patterns("model.safetensors")
    copy = Path(shutil.copytree(BUNDLED_MODELS / "llava-12", tmp_path / "model", ignore=ignore))
    save_file({"a": torch.arange(6.0), "b": torch.ones(2)}, copy / "model.safetensors")
    return copy


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))
    else:
        yield path


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "something else"


def test_every_field_of_every_configuration_is_seen_and_their_layout_is_not(model: Path) -> None:
    before, tried = fingerprint_checkpoint(model), 0
    for file in sorted(model.glob("*config.json")):
        text = file.read_text()
        content = json.loads(text)
        for path in leaves(content):
            edited = json.loads(text)
            place = edited
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = "5.99" if path[-1] in VOLATILE else changed(place[path[-1]])
            file.write_text(json.dumps(edited))
            assert (fingerprint_checkpoint(model) == before) is (path[-1] in VOLATILE), (file.name, path)
            tried += 1
        file.write_text(json.dumps(content, indent=5))
        assert fingerprint_checkpoint(model) == before
        file.write_text(text)
    assert tried > 60


def test_a_configuration_of_before_transformers_5_is_another_for_its_tokenizer(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    found = {}
    for version in ("5.0.0", "5.99.1", "6.1", "4.57.3", "", None):
        (model / "config.json").write_text(json.dumps(config | {"transformers_version": version}))
        found[version] = fingerprint_checkpoint(model)
    assert found["5.0.0"] == found["5.99.1"] == found["6.1"]
    assert found["4.57.3"] == found[""] == found[None] != found["5.0.0"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json", "model.safetensors"])
def test_every_byte_of_the_other_files_is_seen(model: Path, file: str) -> None:
    before = fingerprint_checkpoint(model)
    content = (model / file).read_bytes()
    for place in (-1, -2) if file == "model.safetensors" else (0, len(content) // 2, -1):
        other = bytearray(content)
        other[place] ^= 1
        (model / file).write_bytes(bytes(other))
        assert fingerprint_checkpoint(model) != before


ADDED = [
    "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "additional_chat_templates/rag.jinja", "qformer_tokenizer/tokenizer.json",
    "adapter_config.json", "config.4.9.json",
]  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_is_added_changed_or_taken_away_is_seen(model: Path, name: str) -> None:
    if name.startswith("qformer"):
        (model / "qformer_tokenizer").mkdir()
        (model / "qformer_tokenizer" / "tokenizer_config.json").write_text("{}")
    before = fingerprint_checkpoint(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text('{"a": 1}')
    added = fingerprint_checkpoint(model)
    (model / name).write_text('{"a": 2}')
    assert len({before, added, fingerprint_checkpoint(model)}) == 3
    (model / name).unlink()
    assert fingerprint_checkpoint(model) == before


def test_files_that_no_answer_depends_on_are_not_seen(model: Path) -> None:
    before = fingerprint_checkpoint(model)
    for name in (
        "README.md",
        "README.txt",
        "LICENSE.txt",
        ".gitattributes",
        "skipplan.json",
        "skipplan.db",
        "trainer_state.json",
        "all_results.json",
        "optimizer.pt",
        "picture.png",
        "modeling_x.py",
    ):
        (model / name).write_text("something")
    (model / "data").mkdir()
    (model / "data" / "annotations.json").write_text("[]")
    assert fingerprint_checkpoint(model) == before


def test_code_counts_where_it_is_run(model: Path) -> None:
    before = fingerprint_checkpoint(model, trust_remote_code=True)
    assert before == fingerprint_checkpoint(model)
    (model / "parts").mkdir()
    found = {before}
    for name in ("modeling_x.py", "parts/layer.py"):
        for content in ("a = 1", "a = 2"):
            (model / name).write_text(content)
            found.add(fingerprint_checkpoint(model, trust_remote_code=True))
    assert len(found) == 5
    assert fingerprint_checkpoint(model) == before


KINDS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("present", [kinds for n in range(1, 5) for kinds in combinations(KINDS, n)])
def test_the_weights_are_those_that_transformers_loads(tmp_path: Path, present: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in present:
        part = f"part-of-{name.removesuffix('.index.json')}"
        if name.endswith(".index.json"):
            (tmp_path / part).touch()
            (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {"x": part}}))
        else:
            (tmp_path / name).touch()
    allowed = ("pytorch_model.bin", "part-of-pytorch_model.bin")
    ours = weight_files(tmp_path, allowed)
    theirs, _ = _get_resolved_checkpoint_files(
        tmp_path,
        None,
        None,
        not any(name.startswith("pytorch") for name in (f.name.removeprefix("part-of-") for f in ours)),
        None,
        False,
    )
    assert [str(file) for file in ours] == theirs


def test_an_old_index_beside_a_single_file_is_not_hashed(model: Path) -> None:
    before = fingerprint_checkpoint(model)
    save_file({"a": torch.zeros(6)}, model / "old.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    assert fingerprint_checkpoint(model) == before
    save_file({"a": torch.zeros(6), "b": torch.ones(2)}, model / "model.safetensors")
    assert fingerprint_checkpoint(model) != before


def test_weights_that_the_configuration_names_are_loaded_and_hashed(tiny_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_directory, tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, copy / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert [file.name for file in weight_files(copy)] == ["other.safetensors"]
    loaded = load_model(ModelSource(str(copy), device="cpu")).model.state_dict()
    plain = load_model(ModelSource(str(tiny_directory), device="cpu")).model.state_dict()
    assert [key for key in plain if not torch.equal(plain[key], loaded[key])] == [name.removeprefix("language_model.")]
    for wrong in ("gone.safetensors", "../other.safetensors", "pytorch_model.bin"):
        (copy / "pytorch_model.bin").touch()
        (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": wrong}))
        with pytest.raises(ModelError, match=r"config\.json"):
            weight_files(copy)


ELSEWHERE = "owner/name--modeling_x.Model"


@pytest.mark.parametrize(
    ("file", "auto_map", "code"),
    [
        ("config.json", {"AutoConfig": "configuration_x.Config", "AutoModel": ELSEWHERE}, "modeling_x.Model"),
        ("processor_config.json", {"AutoProcessor": ELSEWHERE}, "modeling_x.Model"),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "a/b--tok.Fast"]}, "tok.Fast"),
    ],
)
def test_code_that_would_be_fetched_from_elsewhere_is_refused_where_code_is_run(
    model: Path, file: str, auto_map: dict[str, Any], code: str
) -> None:
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(content | {"auto_map": auto_map}))
    check_checkpoint(model)
    fingerprint_checkpoint(model)
    for check in (check_checkpoint, fingerprint_checkpoint):
        with pytest.raises(ModelError, match=f"auto_map of {file} takes {code} from .*, which may change unseen; copy"):
            check(model, trust_remote_code=True)
    own = json.dumps(auto_map).replace("owner/name--", "").replace("a/b--", "")
    (model / file).write_text(json.dumps(content | {"auto_map": json.loads(own)}))
    check_checkpoint(model, trust_remote_code=True)
    with pytest.raises(ModelError, match="which may change unseen"):
        (model / file).write_text(json.dumps(content | {"auto_map": auto_map}))
        load_model(ModelSource(str(model), device="cpu", trust_remote_code=True))
