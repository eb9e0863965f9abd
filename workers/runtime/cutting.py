"""Cutting layers out of a checkpoint's files: tensors are left out and renamed, their bytes are copied as they are.

Quantised weights cannot be saved from the live model as they were read. What a tensor's bytes mean does not matter
here: only whose layer it is of, which is where transformers loads it to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .layer_config import Kept, renumbering
from .locate import DecoderStack
from .plan import Action, PlanError, SkipPlan
from .sublayers import block_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, QUANTISATION = "config.json", "quantization_config"
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Cut:
    """The tensors of a checkpoint that stay, and the new name of each, by file."""

    files: tuple[tuple[Path, dict[str, str]], ...]
    quantisation: dict[str, dict[str, Any]]
    """By section of ``config.json``, empty for the whole, how the weights that stay are quantised."""

    def write(self, directory: Path) -> None:
        """Write the weights, and how they are quantised into the directory's ``config.json``."""
        kept = [(file, names) for file, names in self.files if names]
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(kept, 1):
            target = WEIGHTS if len(kept) == 1 else f"model-{number:05d}-of-{len(kept):05d}.safetensors"
            _copy_tensors(file, directory / target, names)
            weight_map |= dict.fromkeys(names.values(), target)
        if len(kept) > 1:
            size = sum((directory / target).stat().st_size for target in set(weight_map.values()))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        file = directory / CONFIG
        config = json.loads(file.read_text(encoding="utf-8"))
        for section, own in self.quantisation.items():
            (config[section] if section else config)[QUANTISATION] = own
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def plan_cut(stack: DecoderStack, plan: SkipPlan, checkpoint: Path, *, original_names: bool) -> Cut:
    """Find the tensors that stay of the directory that the model, whose layers are all there, was loaded from.

    They keep the checkpoint's names but for the layers' numbers, or with ``original_names`` off get those of the model
    in memory. Of two layers that the plan joins, tensors of the MLP stay of one, all others of the other. Raises
    :class:`PlanError` where the files do not say whose layer a tensor is of.
    """
    number = _Numbers(stack, plan)
    headers = {file: _read_header(file)[1] for file in _weight_files(checkpoint)}
    places = _Places(stack)
    found = {name: places.find(name) for header in headers.values() for name in header if name != "__metadata__"}
    position = _layer_position(found)

    def renamed(name: str) -> str | None:
        place = found[name]
        new = None if place.layer is None else number.of(place.layer, place.path)
        if place.layer is not None and new is None:
            return None
        if not original_names:
            return place.name_in_memory(stack.path, new)
        if new is None:
            return name
        parts = name.split(".")
        return ".".join((*parts[:position], str(new), *parts[position + 1 :]))

    names = {name: renamed(name) for name in found}
    files = tuple(
        (file, {name: new for name in header if (new := names.get(name)) is not None})
        for file, header in headers.items()
    )
    stored = {".".join(name.split(".")[:position]) for name, place in found.items() if place.layer is not None}
    names_of = _Names(stack, {stack.path, *stored}, number)
    return Cut(files, {section: names_of.renumbered(own) for section, own in _settings(checkpoint).items()})


def leave_out_tensors(directory: Path, modules: Iterable[str]) -> None:
    """Take the tensors of some modules out of a checkpoint whose tensors have their names in memory."""
    left_out = tuple(f"{name}." for name in modules)
    if not left_out:
        return
    for file in _weight_files(directory):
        names = {name: name for name in _read_header(file)[1] if name != "__metadata__"}
        kept = {name: name for name in names if not name.startswith(left_out)}
        if not kept:
            file.unlink()
        elif len(kept) < len(names):
            shorter = file.with_name(f".{file.name}")
            _copy_tensors(file, shorter, kept)
            shorter.replace(file)
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        places = {name: file for name, file in index["weight_map"].items() if not name.startswith(left_out)}
        size = sum((directory / file).stat().st_size for file in set(places.values()))
        index |= {"metadata": {"total_size": size}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stored_quantisation(checkpoint: Path | None) -> str:
    """Name the method that a checkpoint's weights are quantised by; empty for none, and without a checkpoint."""
    settings = {} if checkpoint is None else _settings(checkpoint)
    return next((str(own.get("quant_method", "unknown")) for own in settings.values()), "")


def _settings(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Read how weights are quantised, by section of ``config.json``; the name of the whole is empty."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    sections = {"": config, **{key: value for key, value in config.items() if isinstance(value, dict)}}
    return {name: own for name, section in sections.items() if isinstance(own := section.get(QUANTISATION), dict)}


class _Numbers:
    """New numbers of the layers, by part: the MLP of a layer that is joined goes elsewhere than its attention."""

    def __init__(self, stack: DecoderStack, plan: SkipPlan) -> None:
        kept, hidden_size = Kept.of_plan(plan), int(stack.text_config.hidden_size)
        self._layers, self._mlps = renumbering(kept.layers), renumbering(kept.mlps)
        self._of_mlp = {
            layer: block_of(stack.layers[layer], hidden_size).modules(Action.SKIP_MLP)
            for pair in plan.joins
            for layer in pair
        }

    def of(self, layer: int, path: str) -> int | None:
        """Return the new number of what is at ``path`` in a layer; None where it does not stay."""
        of_mlp = path.partition(".")[0] in self._of_mlp.get(layer, ())
        return (self._mlps if of_mlp else self._layers).get(layer)

    def parts(self, layer: int, paths: Iterable[str]) -> list[str]:
        """Return the paths that together are a layer: that of the whole, or those of its parts where it is joined."""
        return [path for path in paths if path and "." not in path] if layer in self._of_mlp else [""]


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a checkpoint goes: the decoder layer, if any, its path in it, and its name in memory."""

    stored: str
    name: str
    layer: int | None
    path: str
    converted: bool

    def name_in_memory(self, stack_path: str, number: int | None) -> str:
        """Return the name in memory of a layer's tensor once the layer has that number; without one, of any other."""
        if self.converted:
            raise PlanError(
                f"transformers does not load {self.stored} as it is stored, so it cannot be written under its name in "
                "memory: this model is exported as a plain checkpoint only, by plans of R and S"
            )
        return self.name if number is None else f"{stack_path}.{number}.{self.path}"


class _Places:
    """Find where transformers loads a checkpoint's tensors to, by the renamings that loading the model needed."""

    def __init__(self, stack: DecoderStack) -> None:
        model: Any = stack.model
        # Weights that were made plain ones while they were loaded leave no trace of what was renamed.
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._prefix, self._path = model.base_model_prefix, f"{stack.path}."
        self._modules = {name for name, _ in model.named_modules()}

    def find(self, stored: str) -> _Place:
        renamed, pattern = rename_source_key(stored, self._renamings, self._converters)
        for name in (renamed, stored):
            for candidate in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
                if candidate.startswith(self._path):
                    layer, _, path = candidate.removeprefix(self._path).partition(".")
                    return _Place(stored, candidate, int(layer) if layer.isdigit() else None, path, pattern is not None)
                if candidate.rpartition(".")[0] in self._modules:
                    return _Place(stored, candidate, None, "", pattern is not None)
        return _Place(stored, renamed, None, "", pattern is not None)


def _layer_position(found: Mapping[str, _Place]) -> int:
    """Return which of the parts of the names of layers' tensors is the layer's number."""
    of_layers = [(name.split("."), place.layer) for name, place in found.items() if place.layer is not None]
    if not of_layers:
        raise PlanError("none of the checkpoint's tensors goes to a decoder layer")
    shortest = min(len(parts) for parts, _ in of_layers)
    for position in range(shortest):
        if all(parts[position] == str(layer) for parts, layer in of_layers):
            return position
    raise PlanError("the checkpoint's names of tensors do not number the layers as the model does")


class _Names:
    """Give the names of layers' modules, in settings that list some, the layers' new numbers.

    ``prefixes`` are the names of the list of layers, in memory and in the files. Some methods take a part of a name.
    """

    def __init__(self, stack: DecoderStack, prefixes: Iterable[str], number: _Numbers) -> None:
        self._number = number
        self._paths = [[path for path, _ in layer.named_modules()] for layer in stack.layers]
        self._whole: dict[str, tuple[str, int]] = {}
        self._parts: dict[str, tuple[str, int]] = {}
        for prefix in prefixes:
            self._whole |= self._under(prefix)
            names = prefix.split(".")
            for first in range(len(names)):
                self._parts |= self._under(".".join(names[first:]))

    def _under(self, prefix: str) -> dict[str, tuple[str, int]]:
        return {
            f"{prefix}.{layer}.{path}".rstrip("."): (prefix, layer)
            for layer, paths in enumerate(self._paths)
            for path in paths
        }

    def renumbered(self, value: Any) -> Any:
        """Return settings in whose lists the names of modules have their layers' new numbers.

        A regular expression of compressed-tensors (``re:...``) that tells layers apart becomes the names that it means.
        """
        if isinstance(value, dict):
            return {key: self.renumbered(each) for key, each in value.items()}
        if not isinstance(value, list):
            return value
        return [new for each in value for new in self._entry(each)]

    def _entry(self, value: Any) -> list[Any]:
        if not isinstance(value, str):
            return [self.renumbered(value)]
        if value in self._parts:
            return self._new_names([value])
        meant = self._told_apart(value.removeprefix("re:")) if value.startswith("re:") else []
        return self._new_names(meant) if meant else [value]

    def _new_names(self, names: Iterable[str]) -> list[str]:
        found: list[str] = []
        for name in names:
            prefix, layer = self._parts[name]
            path = name.removeprefix(f"{prefix}.{layer}").removeprefix(".")
            found += [
                f"{prefix}.{new}.{each}".rstrip(".")
                for each in ([path] if path else self._number.parts(layer, self._paths[layer]))
                if (new := self._number.of(layer, each)) is not None
            ]
        return found

    def _told_apart(self, pattern: str) -> list[str]:
        """Names that a pattern matches, where it does not match the same ones in every layer; else none."""
        matched = [name for name in self._whole if re.match(pattern, name)]
        in_layers: dict[str, dict[int, set[str]]] = {}
        for name, (prefix, layer) in self._whole.items():
            own = in_layers.setdefault(prefix, {}).setdefault(layer, set())
            if name in matched:
                own.add(name.removeprefix(f"{prefix}.{layer}"))
        alike = all(len({frozenset(names) for names in layers.values()}) == 1 for layers in in_layers.values())
        return [] if alike else matched


def _weight_files(checkpoint: Path) -> list[Path]:
    if (checkpoint / WEIGHTS).is_file():
        return [checkpoint / WEIGHTS]
    if not (checkpoint / INDEX).is_file():
        raise PlanError(f"{checkpoint} has no {WEIGHTS}, nor an index of several: quantised weights are cut from these")
    index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
    return [checkpoint / name for name in sorted(set(index["weight_map"].values()))]


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Read where a safetensors file's data begin, and its tensors' dtypes, shapes and offsets."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def _copy_tensors(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copy some tensors of a safetensors file, under new names and with the file's metadata, without reading them."""
    start, header = _read_header(source)
    kept = sorted(names, key=lambda name: header[name]["data_offsets"][0])
    written = {"__metadata__": header.get("__metadata__", {"format": "pt"})}
    end = 0
    for name in kept:
        first, last = header[name]["data_offsets"]
        written[names[name]] = header[name] | {"data_offsets": [end, end := end + last - first]}
    text = json.dumps(written, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(len(text).to_bytes(8, "little") + text)
        for name in kept:
            first, last = header[name]["data_offsets"]
            read.seek(start + first)
            for position in range(first, last, _BLOCK_BYTES):
                write.write(read.read(min(_BLOCK_BYTES, last - position)))
