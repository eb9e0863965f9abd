"""Write configuration, tokenizer and processor files in the form of the hub's checkpoints, which engines read.

transformers 5 writes some files and fields in another form than its predecessors, and reads both. Engines are written
for what the hub has: other libraries' checkpoints of years, and many read an old field's default without a word where
there is only the new one. So both forms are written. ``docs/exports.md`` has the table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.errors import ModelError
from workers.models.loading import LoadedModel

_FAST_TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of tokenizers by their names since transformers 5, with those before; both releases know the latter."""
_TEXT_ARCHITECTURES = {"idefics3": "VLlama3ForCausalLM", "smolvlm": "VLlama3ForCausalLM"}
"""What the hub's text configurations of a family name, by which llama.cpp's converter finds its class."""
_INTERLEAVED_SECTIONS = frozenset({"qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text"})
"""Text models of which transformers always interleaves the sections of multimodal rotary positions; engines read it."""
_INTERLEAVED = "mrope_interleaved"
_OLD_FIELDS = ("torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "architectures")
_CONVERSATION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def write_published_form(loaded: LoadedModel, directory: Path) -> None:
    """Complete the written checkpoint in ``directory``. Raises ModelError where it would then be read otherwise."""
    before = _settings(loaded, directory)
    _change(directory / "config.json", _old_fields)
    _change(directory / "tokenizer_config.json", _old_tokenizer)
    _write_preprocessor(directory)
    after = _settings(loaded, directory)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ModelError(
            f"with the fields that engines read, transformers reads {', '.join(changed)} otherwise: this family's "
            "configuration cannot be written in both forms"
        )
    _require_same_prompt(loaded, directory)


def _settings(loaded: LoadedModel, directory: Path) -> dict[str, Any]:
    """Read the configuration as transformers does, sections flattened, fields of both forms left to one."""

    def flat(content: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in content.items():
            if isinstance(value, dict) and name.endswith("_config"):
                yield from flat(value, f"{path}{name}.")
            elif isinstance(value, dict) and name == "rope_parameters":
                yield f"{path}{name}", {key: own for key, own in value.items() if key != _INTERLEAVED}
            elif name not in _OLD_FIELDS:
                yield f"{path}{name}", value

    return dict(flat(type(loaded.model.config).from_pretrained(directory).to_dict(), ""))


def _change(file: Path, change: Any) -> None:
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _old_fields(config: dict[str, Any]) -> None:
    """Add the text model's class, and to every section the rotary embedding's settings and the dtype as of before."""
    if (family := config.get("model_type")) in _TEXT_ARCHITECTURES and "text_config" in config:
        text = config["text_config"]
        text["architectures"] = text.get("architectures") or [_TEXT_ARCHITECTURES[family]]
    for section in _sections(config):
        if "dtype" in section:
            section.setdefault("torch_dtype", section["dtype"])
        rope = section.get("rope_parameters")
        if not isinstance(rope, dict):
            continue
        if section.get("model_type") in _INTERLEAVED_SECTIONS:
            rope.setdefault(_INTERLEAVED, True)
        # Gemma 3 has a set for each type of layer; the hub's has one, and a base for layers with a window.
        local, own = rope.get("sliding_attention"), rope.get("full_attention", rope)
        if isinstance(local, dict) and "rope_theta" in local:
            section.setdefault("rope_local_base_freq", local["rope_theta"])
        if isinstance(own, dict) and "rope_theta" in own:
            section.setdefault("rope_theta", own["rope_theta"])
            scaling = {name: value for name, value in own.items() if name != "rope_theta"}
            if scaling.get("rope_type", "default") != "default" or "mrope_section" in scaling:
                section.setdefault("rope_scaling", scaling)


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    yield from (value for name, value in config.items() if name.endswith("_config") and isinstance(value, dict))


def _old_tokenizer(config: dict[str, Any]) -> None:
    if (name := config.get("tokenizer_class")) in _FAST_TOKENIZER:
        config["tokenizer_class"] = _FAST_TOKENIZER[name]


def _write_preprocessor(directory: Path) -> None:
    """Write the image processor's settings into the file of their own that they had before."""
    file, whole = directory / "preprocessor_config.json", directory / "processor_config.json"
    if file.exists() or not whole.is_file():
        return
    settings = json.loads(whole.read_text(encoding="utf-8"))
    if own := settings.get("image_processor"):
        content = own | {"processor_class": settings.get("processor_class")}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_start_of_text(loaded: LoadedModel, directory: Path) -> None:
    """Let the chat template begin with the token that the tokenizer puts first by itself, for engines.

    They add no special token to a chat, transformers does. Not for exports that are loaded in transformers: who renders
    the template to text and gives that to the processor would have the token twice.
    """
    tokenizer, template = getattr(loaded.processor, "tokenizer", None), directory / "chat_template.jinja"
    if tokenizer is None or tokenizer.bos_token is None or not template.is_file():
        return
    text = loaded.processor.apply_chat_template(_CONVERSATION, add_generation_prompt=True, tokenize=False)
    first = tokenizer(text)["input_ids"][:1]
    if first == [tokenizer.bos_token_id] and not text.startswith(tokenizer.bos_token):
        template.write_text("{{ bos_token }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
        _require_same_prompt(loaded, directory)


def write_vocabulary(loaded: LoadedModel, directory: Path) -> None:
    """Write what llama.cpp's converter reads of tokenizers like SentencePiece besides ``tokenizer.json``, for engines.

    transformers 5 saves that file alone. Without the model's own ``tokenizer.model`` the converter gives every token
    the same score, by which texts are cut otherwise; without these settings the engine begins every text with a space
    and the first special token.
    """
    tokenizer, file = getattr(loaded.processor, "tokenizer", None), directory / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if tokenizer is None or not content.get("model", {}).get("byte_fallback"):
        return
    if (own := Path(tokenizer.name_or_path, "tokenizer.model")).is_file():
        shutil.copyfile(own, directory / own.name)
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    settings = {
        "add_bos_token": whole != plain and whole[0] == tokenizer.bos_token_id,
        "add_prefix_space": tokenizer.convert_ids_to_tokens(plain)[0].startswith("▁"),
        "added_tokens_decoder": {str(token.pop("id")): token for token in content["added_tokens"]},
    }
    _change(directory / "tokenizer_config.json", lambda config: config.update(settings | config))
    _require_same_prompt(loaded, directory)


def _require_same_prompt(loaded: LoadedModel, directory: Path) -> None:
    """Raise ModelError when transformers makes another prompt by what was written than the live model is asked."""
    from PIL import Image

    from workers.models.without_torchvision import load_auto_processor

    picture = Image.new("RGB", (256, 192), (200, 30, 60))
    turn = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    if not getattr(loaded.processor, "chat_template", None):
        return
    written = load_auto_processor(directory)
    prompts = [
        processor.apply_chat_template(
            [[{"role": "user", "content": turn}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"].tolist()
        for processor in (loaded.processor, written)
    ]
    if prompts[0] != prompts[1]:
        raise ModelError(
            f"the processor as it was written makes {len(prompts[1][0])} tokens of a prompt of which the model's makes "
            f"{len(prompts[0][0])}: this family's processor cannot be written in the form that engines read"
        )
