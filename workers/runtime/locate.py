"""Finding the decoder layers of a live model by inspection: module list, owner, configurations, layer kinds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from .descriptor import UnsupportedFamilyError

VISION_TOKEN_NAME = re.compile(r"(image|video)_token_(id|index)|image_patch_id")
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
MASK_ARGUMENTS = ("attention_mask", "causal_mask", "mask")
INDEX_ATTRIBUTES = ("layer_idx", "layer_index", "layer_id", "layer_number", "layer_num")


@dataclass(frozen=True)
class DecoderStack:
    """Live handles on a model's decoder layers."""

    model: nn.Module
    path: str
    """Dotted name of ``layers`` in ``model``."""
    layers: nn.ModuleList
    owner: nn.Module
    """The module that holds the list and loops over it."""
    text_config: Any
    configs: tuple[Any, ...]
    """Distinct configuration objects that describe the decoder (usually one, shared)."""

    @property
    def family(self) -> str:
        """The ``model_type`` of the whole model."""
        config: Any = self.model.config
        return str(config.model_type)


def forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Named arguments of a module class's forward, without ``self``."""
    parameters = dict(_parameters(type(module).forward))
    parameters.pop("self", None)
    return parameters


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def argument_name(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Return the first of ``names`` that the module's forward takes."""
    parameters = forward_parameters(module)
    return next((name for name in names if name in parameters), None)


def locate(model: nn.Module) -> DecoderStack:
    """Find the decoder layers of ``model``.

    Raises :class:`UnsupportedFamilyError` naming what was not found.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedFamilyError(f"{type(model).__name__} has no transformers configuration")
    text_config = config.get_text_config(decoder=True)
    family = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False) or getattr(text_config, "is_encoder_decoder", False):
        raise UnsupportedFamilyError(
            f"{family}: encoder-decoder models are not supported (image tokens never enter the decoder's own sequence)"
        )
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise UnsupportedFamilyError(f"{family}: {type(text_config).__name__} has no num_hidden_layers")
    found = [
        (path, layers, owner)
        for path, layers, owner in _module_lists(model)
        if len(layers) == num_layers and _is_decoder_list(layers) and _described_by(model, path, text_config)
    ]
    if len(found) != 1:
        listed = ", ".join(path for path, _, _ in found) or "none"
        raise UnsupportedFamilyError(
            f"{family}: expected one list of {num_layers} decoder layers described by {type(text_config).__name__}, "
            f"found {len(found)} ({listed})"
        )
    path, layers, owner = found[0]
    elsewhere = _used_elsewhere(model, layers)
    if elsewhere:
        raise UnsupportedFamilyError(
            f"{family}: the weights of the decoder layers {path} are those of {elsewhere} too, which a plan on one of "
            "them would leave as it is"
        )
    return DecoderStack(
        model=model,
        path=path,
        layers=layers,
        owner=owner,
        text_config=text_config,
        configs=_configs_of(model, path, text_config),
    )


def shares_keys(layer: nn.Module) -> bool:
    """Whether a layer attends to the keys and values of an earlier layer and makes none."""
    return any(module.__dict__.get("is_kv_shared_layer") is True for module in layer.modules())


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Return placeholder ids of image and video features that ``config`` names."""
    names = {*config.__dict__, *type(config).attribute_map}
    values = (getattr(config, name, None) for name in names if VISION_TOKEN_NAME.fullmatch(name))
    return tuple(sorted({value for value in values if isinstance(value, int)}))


def ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules on the way from ``model`` (first) to the owner of ``path`` (last)."""
    module = model
    yield module
    for name in path.split(".")[:-1]:
        module = getattr(module, name)
        yield module


def _module_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList, nn.Module]]:
    for owner_path, owner in model.named_modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList):
                yield (f"{owner_path}.{name}" if owner_path else name), child, owner


def _used_elsewhere(model: nn.Module, layers: nn.ModuleList) -> str:
    """Name of a module outside of ``layers`` that has one of their modules or parameters, empty if none."""
    inside = {id(module) for module in layers.modules()}
    weights = {id(parameter) for parameter in layers.parameters()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if any(id(child) in inside for child in module.children() if child is not layers):
            return str(name)
        if any(id(parameter) in weights for parameter in module.parameters(recurse=False)):
            return str(name)
    return ""


def _is_decoder_list(layers: nn.ModuleList) -> bool:
    """Tell decoder layers: they take hidden states first, and an attention mask and a cache somewhere."""
    for layer in layers:
        parameters = list(forward_parameters(layer))
        if not parameters or "hidden_state" not in parameters[0]:
            return False
    return all(argument_name(layer, CACHE_ARGUMENTS) is not None for layer in layers)


def _described_by(model: nn.Module, path: str, text_config: Any) -> bool:
    """Whether the nearest module around ``path`` that has a configuration has the text configuration."""
    configs = [module.config for module in ancestors(model, path) if getattr(module, "config", None) is not None]
    return bool(configs) and (configs[-1] is text_config or type(configs[-1]) is type(text_config))


def _configs_of(model: nn.Module, path: str, text_config: Any) -> tuple[Any, ...]:
    """Return the text configuration and its copies on the way to the layers."""
    found = [text_config]
    for module in ancestors(model, path):
        config = getattr(module, "config", None)
        if config is None:
            continue
        # A wrapper's own configuration leads to the text configuration; it is found again from there.
        own = config.get_text_config(decoder=True)
        if type(own) is type(text_config) and all(own is not other for other in found):
            found.append(own)
    return tuple(found)
