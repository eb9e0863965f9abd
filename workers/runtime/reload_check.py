"""Would plain transformers load the pruned model as it stands? Asked before a checkpoint appears.

Configurations have rules of their own when they are read (Gemma 4 turns the last layer into full attention). The
decoder is therefore built anew from the saved configuration, without memory for weights, and compared layer by layer.
What was written is then loaded, and compared by the names, shapes and values of its tensors, and by its logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .locate import DecoderStack, locate
from .plan import PlanError
from .quantised import UNPACKED, quantisation_of, unpack, without_progress_bars

WORDS = 8
KERNELS = ("_attn_implementation_internal", "_experts_implementation_internal")
RULED_OUT = 1e30
"""Ids that a model rules out itself get the smallest number of their type instead of a logit."""
PLAIN = (bool, int, float, str, type(None))


def require_faithful_reload(stack: DecoderStack) -> None:
    """Raise :class:`PlanError` when the model's configuration, saved and read, describes other decoder layers."""
    model: Any = stack.model
    try:
        with tempfile.TemporaryDirectory() as directory:
            model.config.save_pretrained(directory)
            config = type(model.config).from_pretrained(directory)
        rebuilt = _rebuild(stack, config)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PlanError(
            f"transformers could not load the {stack.family} model without these layers: {error}"
        ) from error
    if len(rebuilt) != len(stack.layers):
        raise PlanError(
            f"transformers would load {len(rebuilt)} of {len(stack.layers)} layers of the pruned {stack.family} model"
        )
    for index, (own, other) in enumerate(zip(stack.layers, rebuilt, strict=True)):
        for difference in _differences(own, other, quantised=bool(quantisation_of(model.config))):
            raise PlanError(
                f"transformers would load layer {index} of the pruned {stack.family} model differently: {difference}"
            )


def require_faithful_files(stack: DecoderStack, directory: Path) -> None:
    """Raise :class:`PlanError` when the checkpoint in ``directory``, loaded, is not the model that was saved there.

    The loaded weights stay in their files: each is compared with the model's own, which then takes its place. So no
    second copy of the model is held, and what computes the logits is the loaded model with the weights compared.
    """
    model: Any = stack.model
    try:
        with torch.random.fork_rng(devices=[]), without_progress_bars():
            loaded, report = type(model).from_pretrained(
                directory,
                config=type(model.config).from_pretrained(directory),
                output_loading_info=True,
            )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"transformers could not load the {stack.family} model as it was saved: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(map(str, report[kind]))
            raise PlanError(
                f"transformers does not read back what it writes of a {stack.family} model: {len(names)} "
                f"{kind.replace('_', ' ')}, such as {names[0]} (its save_pretrained and from_pretrained disagree)"
            )
    unpack(loaded)
    _compare_tensors(stack.family, model, loaded, replace=quantisation_of(model.config) in ("", UNPACKED))
    _compare_logits(stack, loaded)


def _compare_tensors(family: str, model: nn.Module, loaded: nn.Module, *, replace: bool) -> None:
    """Compare all parameters and buffers; with ``replace`` the loaded model gets the model's own in their places.

    Modules that keep more of quantised weights than these would not work with others. Some change what they keep when
    they first run: that is left to the comparison of logits.
    """
    own, found = _saved(model), _saved(loaded)
    if own.keys() != found.keys():
        odd = sorted(own.keys() ^ found.keys())
        raise PlanError(f"transformers would load the {family} model with other tensors: {', '.join(odd[:3])}")
    for name in own:
        ours, theirs = own[name], found.pop(name)
        if ours.shape != theirs.shape:
            shapes = f"{list(theirs.shape)} instead of {list(ours.shape)}"
            raise PlanError(f"transformers would load {name} of the {family} model with shape {shapes}")
        if not ours.is_meta and not torch.equal(_bits(ours.to(theirs.device, theirs.dtype)), _bits(theirs)):
            raise PlanError(f"transformers would load {name} of the {family} model with other values")
        if not replace:
            continue
        path, _, leaf = name.rpartition(".")
        module = loaded.get_submodule(path)
        places: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        places[leaf] = ours


def _saved(model: nn.Module) -> dict[str, Tensor]:
    places = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in places}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _compare_logits(stack: DecoderStack, loaded: nn.Module) -> None:
    """Compare what the model, or the first part on the way to its decoder that takes words alone, answers to a few.

    A model whose weights are on several devices is not run a second time.
    """
    devices = {tensor.device for tensor in stack.model.state_dict().values()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        return
    loaded.to(*devices)
    _compute_alike(stack.model, loaded)
    ids = _some_words(stack).to(*devices)
    with torch.no_grad(), _as_it_was(stack.model):
        for path in _on_the_way(stack.path):
            try:
                expected = _answer(stack.model.get_submodule(path), ids)
            except Exception:  # it takes no words alone: the next part does, or no part
                continue
            _require_same(stack.family, _answer(loaded.get_submodule(path), ids), expected)
            return


def _compute_alike(model: nn.Module, loaded: nn.Module) -> None:
    """Have the loaded model compute attention and experts by the same kernels: checkpoints do not say which."""
    for own, other in zip(model.modules(), loaded.modules(), strict=True):
        if (config := getattr(own, "config", None)) is not None:
            other.config.__dict__.update({name: config.__dict__[name] for name in KERNELS if name in config.__dict__})


def _on_the_way(path: str) -> list[str]:
    """Names of the modules from the whole model to the one that holds the layers."""
    names = path.split(".")[:-1]
    return [".".join(names[:depth]) for depth in range(len(names) + 1)]


def _require_same(family: str, found: Tensor, expected: Tensor) -> None:
    scale = expected[expected.abs() < RULED_OUT].abs().max()
    tolerance = 8 * torch.finfo(expected.dtype).eps * float(scale)
    if expected.shape != found.shape or not torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True):
        raise PlanError(f"the {family} model as transformers would load it gives other logits")


def _answer(module: Any, ids: Tensor) -> Tensor:
    """Logits, or states where the module has none, for ids ``[1, tokens]``."""
    answer: Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return answer


def _some_words(stack: DecoderStack) -> Tensor:
    """Ids ``[1, tokens]`` that stand for words: none that the configuration names."""
    model: Any = stack.model
    named = {
        value
        for config in (model.config, stack.text_config)
        for value in vars(config).values()
        if isinstance(value, int)
    }
    vocabulary = model.get_input_embeddings().weight.shape[0]
    words = [word for word in range(vocabulary // 3, vocabulary) if word not in named]
    return torch.tensor([words[:WORDS]])


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore the modules' attributes afterwards: some note positions while they run."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _rebuild(stack: DecoderStack, config: Any) -> nn.ModuleList:
    with torch.device("meta"):
        if isinstance(stack.owner, PreTrainedModel):
            owner = type(stack.owner)._from_config(config.get_text_config(decoder=True))
            layers = getattr(owner, stack.path.rsplit(".", 1)[-1])
        else:
            layers = locate(type(stack.model)._from_config(config)).layers  # type: ignore[attr-defined]
    assert isinstance(layers, nn.ModuleList)
    return layers


def _differences(own: nn.Module, other: nn.Module, *, quantised: bool) -> Iterator[str]:
    """List differences of two decoder layers: modules, plain attributes, shapes of weights.

    What stands for the linear projections of a ``quantised`` model is compared when its files are read back.
    """
    modules, others = dict(own.named_modules()), dict(other.named_modules())
    for name in modules.keys() ^ others.keys():
        yield f"{name} exists in one of them only"
    for name in modules.keys() & others.keys():
        if quantised and isinstance(others[name], nn.Linear):
            continue
        first, second = _facts(modules[name]), _facts(others[name])
        for key in first.keys() & second.keys():
            if first[key] != second[key]:
                yield f"{name or type(own).__name__}.{key} would be {second[key]!r} instead of {first[key]!r}"


def _facts(module: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": type(module).__name__}
    for name, value in vars(module).items():
        if name == "training" or name.startswith("_"):
            continue
        if isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, PLAIN) for v in value)):
            facts[name] = value
    for name, parameter in module.named_parameters(recurse=False):
        facts[name] = tuple(parameter.shape)
    return facts
