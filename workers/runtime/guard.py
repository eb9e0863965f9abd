"""Tell prompts like those that a plan was calibrated on from others, by states that dense and plan share.

A prompt's features are the means of its text tokens' and of its vision tokens' states where decoder layer ``layer``
begins, below everything that the plan changes. Its score is their squared Mahalanobis distance from the calibration
prompts' (Lee et al. 2018, arXiv 1807.03888), under the covariance of Ledoit and Wolf (2004).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folding import FoldingError, fold_site
from .locate import DecoderStack, locate, vision_token_ids
from .tensor_file import read_tensors

FILE_NAME = "guard/guard.safetensors"
"""In an export, in a directory of its own, since servers take every safetensors file beside the model for weights."""
FORMAT = 1
TENSORS = ("mean", "scale", "basis", "variances")


class GuardError(ValueError):
    """A guard that cannot be read or asked, or a prompt that it sends to a dense model which is not there."""


@dataclass(frozen=True)
class Guard:
    """A distribution of calibration prompts, and the score above which a prompt is outside of it.

    With z the standardised features, the score is the sum of (basis^T z)^2 / variances and of what the basis leaves of
    z, squared, over ``floor``: the eigenvectors of the shrunken covariance, and its eigenvalue everywhere else.
    """

    model_fingerprint: str
    """Of the dense model."""
    layer: int
    """The decoder layer whose input is read; those below are the same in the dense model and under the plan."""
    mean: Tensor
    """``[features]``, float32; the first half is of text tokens, the second of vision tokens."""
    scale: Tensor
    """``[features]``, float32: standard deviations."""
    basis: Tensor
    """``[features, rank]``, float32, with orthonormal columns."""
    variances: Tensor
    """``[rank]``, float32."""
    floor: float
    threshold: float
    """Largest score of a prompt that is admitted."""
    false_alarms: float
    """Share of prompts of the calibrated kind that the threshold was set to send away, at most."""
    fitted_on: int
    """Prompts that the distribution was fitted on."""
    threshold_on: int
    """Prompts that the threshold comes from, others than those, one an image."""

    def score(self, features: Tensor) -> Tensor:
        """Return the squared distances ``[batch]``, float32, of features ``[batch, features]``.

        Raises GuardError where they are of another model, with another hidden size.
        """
        if features.shape[-1] != len(self.mean):
            raise GuardError(
                f"the guard is of another model: it was fitted on states of {len(self.mean) // 2} numbers, not "
                f"{features.shape[-1] // 2}"
            )
        here = features.device
        standard = (features.float() - self.mean.to(here)) / self.scale.to(here)
        basis = self.basis.to(here)
        along = standard @ basis
        rest = (standard - along @ basis.T).square().sum(-1)
        return (along.square() / self.variances.to(here)).sum(-1) + rest / self.floor

    def inside(self, features: Tensor) -> Tensor:
        """Tell which prompts are admitted, bool ``[batch]``; features that are no numbers are not."""
        return self.score(features) <= self.threshold

    def admits(self, model: nn.Module, **inputs: Any) -> Tensor:
        """Tell which prompts are admitted, bool ``[batch]``, from a forward pass that ends where ``layer`` begins.

        ``inputs`` are those of the model's forward. The model is the dense one or runs the plan. Raises GuardError.
        """
        found: list[Tensor] = []

        def stop(features: Tensor) -> None:
            found.append(self.inside(features))
            raise _Stopped

        stack = locate(model)
        ids = vision_token_ids(stack.model.config)
        with torch.inference_mode(), watching(stack.layers[self.layer], ids, inputs, stop):
            try:
                model(**inputs)
            except _Stopped:
                return found[0]
        raise GuardError(f"decoder layer {self.layer} did not run, so the guard saw no prompt")

    @classmethod
    def read(cls, content: bytes) -> Guard:
        """Read a guard's safetensors file. Raises GuardError when it is none."""
        try:
            tensors, record = read_tensors(content)
            if record.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            record |= tensors
            guard = cls(**record)
            size, rank = guard.basis.shape
            if (guard.mean.shape, guard.scale.shape, guard.variances.shape) != ((size,), (size,), (rank,)):
                raise ValueError("its tensors do not fit each other")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise GuardError(f"the guard's file cannot be read: {' '.join(str(error).split())}") from None
        return guard

    @classmethod
    def load(cls, file: Path) -> Guard:
        """Read a guard's file. Raises GuardError when it is missing or none."""
        try:
            return cls.read(file.read_bytes())
        except OSError as error:
            raise GuardError(f"the guard's file {file} cannot be read: {error.strerror}") from None


# Prompts ------------------------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """Ends a forward pass at the guard's layer; no Exception, so that model code does not catch it."""


def prompt_features(states: Tensor, vision: Tensor, text: Tensor) -> Tensor:
    """Return ``[batch, 2 * hidden]``, float32: the means of the text and of the vision tokens' states.

    ``states`` are ``[batch, tokens, hidden]``, the masks bool ``[batch, tokens]``. The mean of no tokens is 0.
    """
    return torch.cat([_mean(states.float(), mask) for mask in (text, vision)], dim=1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None], states, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@contextmanager
def watching(
    layer: nn.Module, vision_ids: Sequence[int], inputs: Mapping[str, Any], decide: Callable[[Tensor], None]
) -> Iterator[None]:
    """Hand the features of the prompts in ``inputs`` to ``decide`` when a decoder layer first gets them.

    Only calls of this thread count. ``inputs`` holds ``input_ids`` ``[batch, tokens]`` and may hold
    ``attention_mask``. Raises GuardError when prompts cannot be told by their tokens.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise GuardError("the guard needs input_ids, to tell text from vision tokens")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    vision = torch.isin(ids, torch.tensor(vision_ids, device=ids.device)) & real
    me, seen = threading.get_ident(), False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if seen or threading.get_ident() != me:
            return
        seen = True
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        times = max(1, states.shape[0] // ids.shape[0])
        if states.dim() != 3 or states.shape[:2] != (times * ids.shape[0], ids.shape[1]):
            raise GuardError(
                f"the decoder's states are {list(states.shape)} where prompts are {list(ids.shape)}: the guard needs "
                "one state per token of the prompt"
            )
        own = states[::times]  # beams repeat their prompt
        decide(prompt_features(own, vision.to(own.device), (real & ~vision).to(own.device)))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Exports ------------------------------------------------------------------------------------------------------------


class Guarded:
    """Let ``generate`` of a model class answer with the plan inside the guard, and with the dense model outside.

    A mixin that stands before a model class of transformers. ``guard`` and ``dense`` are attributes of the loaded
    model: without a guard the plan answers everything.
    """

    guard: Guard | None = None
    dense: Any = None
    outside: Sequence[int] = ()
    """Prompts of the last call, by their place in the batch, that were outside; the dense model answered the batch."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the model and the guard that its configuration names. Raises GuardError when that is not there."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        expected = getattr(model.config, "guard_checksum", None)
        if expected is not None:
            model.guard = _load_named(pretrained_model_name_or_path, expected, kwargs)
        return loaded

    def attach_dense(self, dense: Any) -> None:
        """Take the dense model that answers what is outside, to this model's device; equal weights are kept once.

        Raises GuardError when it is not the model that the plan was made for.
        """
        share_weights(self, dense)
        object.__setattr__(self, "dense", dense.eval())  # no part of this module: it is saved apart
        self._place_dense()

    def _place_dense(self) -> None:
        """Move the dense model to where this one is now, as far as that is one device."""
        devices = {parameter.device for parameter in self.parameters()}  # type: ignore[attr-defined]
        if len(devices) == 1:
            self.dense.to(*devices)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as the model class does; a batch with a prompt outside of the guard is the dense model's.

        Raises GuardError where that is needed and not attached.
        """
        if self.guard is None:
            return super().generate(inputs, **kwargs)  # type: ignore[misc]
        guard, self.outside = self.guard, ()
        asked = kwargs if inputs is None else kwargs | {"input_ids": inputs}
        outside: list[int] = []

        def decide(features: Tensor) -> None:
            outside.extend((~guard.inside(features)).nonzero().flatten().tolist())
            if outside:
                raise _Stopped

        layer, ids = self._watched(guard)
        try:
            with watching(layer, ids, asked, decide):
                return super().generate(inputs, **kwargs)  # type: ignore[misc]
        except _Stopped:
            self.outside = tuple(outside)
        if self.dense is None:
            raise GuardError(
                f"prompt {outside[0]} of the batch is unlike those that the plan was calibrated on, and this export "
                "holds no dense model to answer it: give one to attach_dense(), or set guard to None to have the plan "
                "answer everything"
            )
        self._place_dense()
        return self.dense.generate(inputs, **kwargs)

    def _watched(self, guard: Guard) -> tuple[nn.Module, Sequence[int]]:
        """Return the guard's layer and the vision tokens' ids, which are looked for once."""
        known: tuple[nn.Module, Sequence[int]] | None = self.__dict__.get("_watched_layer")
        if known is None:
            stack = locate(self)  # type: ignore[arg-type]
            known = stack.layers[guard.layer], vision_token_ids(stack.model.config)
            self.__dict__["_watched_layer"] = known
        return known


def _load_named(source: Any, checksum: str, options: dict[str, Any]) -> Guard:
    """Read the guard beside a model's weights, in a directory or on the hub."""
    from transformers.utils import cached_file

    file: str | Path = Path(source) / FILE_NAME
    if not Path(source).is_dir():
        names = ("revision", "cache_dir", "token", "local_files_only")
        file = cached_file(str(source), FILE_NAME, **{name: options[name] for name in names if name in options})
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise GuardError(
            f"{FILE_NAME} cannot be read beside the model, whose configuration names it: {error.strerror}"
        ) from None
    if hashlib.sha256(content).hexdigest() != checksum:
        raise GuardError(f"{file} is not the guard that the model was written with")
    return Guard.read(content)


def share_weights(model: Any, dense: Any) -> None:
    """Put the model's tensors into the dense one where both hold the same values.

    Raises GuardError where the dense model is another one: all tensors must be equal but those that a map is folded
    into, the last projections of the kept layers' MLPs.
    """
    own, its = locate(model), locate(dense)
    if type(own.text_config) is not type(its.text_config) or len(its.layers) < len(own.layers):
        raise GuardError(f"the dense model is a {its.family} of {len(its.layers)} layers, not the one of this plan")
    mine, other = dict(model.named_parameters()), dict(dense.named_parameters())
    for name, tensor in mine.items():
        if name.startswith(f"{own.path}."):
            continue
        if name not in other or not _equal(tensor, other[name]):
            raise GuardError(f"the dense model is not the one of this plan: its {name} differs (or its dtype)")
        _replace(dense, name, tensor)
    place = 0
    for index, layer in enumerate(own.layers):  # kept layers, in order
        changed = _may_hold_a_map(own, index)
        for later in range(place, len(its.layers)):
            if _share_layer(layer, its.layers[later], changed):
                place = later + 1
                break
        else:
            raise GuardError(
                f"the dense model is not the one of this plan: none of its layers from {place} on is layer {index} of "
                "the plan (or its dtype differs)"
            )


def _may_hold_a_map(stack: DecoderStack, index: int) -> set[int]:
    """Return the ids of a layer's parameters that a map is folded into; none where the layer can hold none."""
    try:
        projections = fold_site(stack, index).projections
    except FoldingError:
        return set()
    return {id(getattr(each.module, name)) for each in projections for name in (each.weight, each.bias) if name}


def _share_layer(layer: nn.Module, dense: nn.Module, changed: set[int]) -> bool:
    """Share the equal tensors of two layers if all but those with an id in ``changed`` are equal."""
    mine, other = dict(layer.named_parameters()), dict(dense.named_parameters())
    if mine.keys() != other.keys():
        return False
    equal = [name for name in mine if _equal(mine[name], other[name])]
    if any(id(mine[name]) not in changed for name in mine.keys() - set(equal)):
        return False
    for name in equal:
        _replace(dense, name, mine[name])
    return True


def _equal(first: Tensor, second: Tensor) -> bool:
    same = first.shape == second.shape and first.dtype == second.dtype
    return same and torch.equal(first, second.to(first.device))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = tensor  # type: ignore[assignment]
