"""Run a plan from some layer on, the layers before it taken from the dense pass: prefixes are computed once.

A replay is one call of the whole model in which everything before the first changed layer gives back what it gave in
the dense pass: the vision tower and its projector, and each earlier decoder layer. The model's own code makes masks and
positions, hands features to later layers and reads the answer, so nothing of a family is written down here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from workers.errors import MeasurementError
from workers.layerwise.hooks import Hooks, hidden_of, with_hidden
from workers.models.loading import LoadedModel
from workers.runtime import apply
from workers.runtime.edits import Edits
from workers.runtime.locate import DecoderStack, ancestors, shares_keys
from workers.runtime.plan import SkipPlan

from .batches import Batch


@dataclass
class DensePass:
    """Outputs of one batch's dense pass: of every layer, and of the modules that ran before the decoder."""

    outputs: list[Any] = field(default_factory=list)
    front: dict[nn.Module, list[Any]] = field(default_factory=dict)
    logits: Tensor | None = None


class NotANumberError(MeasurementError):
    """The logits of some samples hold NaN."""

    def __init__(self, samples: Sequence[str]) -> None:
        super().__init__(f"sample {samples[0]}: the model's logits hold NaN; try another model.dtype")
        self.samples = tuple(samples)


class AnswerLogitsError(MeasurementError):
    """The model does not give the logits of all answer tokens."""

    def __init__(self, given: int, wanted: int) -> None:
        super().__init__(f"the model gives logits of {given} of the {wanted} tokens that the answer is read from")


def prefill(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Logits ``[batch, 1 + answer tokens, vocabulary]`` of the answer's tokens, 0 where there is no answer token.

    The model is entered the way its family prepares inputs for.

    Raises:
        AnswerLogitsError: the model gives logits of fewer tokens, or none.
        NotANumberError: logits hold NaN.
    """
    read: list[Tensor] = []
    places = 1 + batch.answer_tokens

    def note(output: Any) -> None:
        if getattr(output, "logits", None) is not None:
            read[:] = [output.logits[:, -places:].float()]

    options: dict[str, Any] = {}
    if places > 1 and "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        options["logits_to_keep"] = places
    with Hooks() as hooks:
        # Some families (BLIP-2) leave generation to the language model inside them, which is then what is called.
        for module in loaded.model.modules():
            if isinstance(module, GenerationMixin):
                hooks.after(module, note)
        loaded.model.generate(
            **batch.inputs,
            **options,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
        )
    given = read[0].shape[1] if read else 0
    if given != places:
        raise AnswerLogitsError(given, places)
    logits = torch.where(batch.answering[..., None].to(read[0].device), read[0], 0.0)
    if bool(logits.isnan().any()):
        rows = logits.isnan().flatten(1).any(-1).nonzero().flatten().tolist()
        raise NotANumberError([batch.samples[row].id for row in rows])
    return logits


@contextmanager
def record_dense_pass(stack: DecoderStack) -> Iterator[DensePass]:
    """Record a dense pass: copies of every decoder layer's output, and what ran before the decoder."""
    dense = DensePass(outputs=[None] * len(stack.layers))
    reached_decoder: list[bool] = []

    def keep_front(module: nn.Module, output: Any) -> None:
        if not reached_decoder:
            dense.front.setdefault(module, []).append(_copied(output))

    def keep_layer(number: int, output: Any) -> None:
        dense.outputs[number] = with_hidden(output, hidden_of(output).clone())

    with Hooks() as hooks:
        hooks.before(stack.owner, lambda args, kwargs: reached_decoder.append(True))
        for module in _front_modules(stack):
            hooks.after(module, partial(keep_front, module))
        for number, layer in enumerate(stack.layers):
            hooks.after(layer, partial(keep_layer, number))
        yield dense


def replay(
    loaded: LoadedModel, stack: DecoderStack, dense: DensePass, batch: Batch, plan: SkipPlan, first: int
) -> tuple[Tensor, Tensor]:
    """Run ``plan``, whose layers before ``first`` run as in the dense pass, from layer ``first`` on.

    Gives the answer's logits ``[batch, 1 + answer tokens, vocabulary]``, and the state after the last
    layer, ``[batch, tokens, hidden]``.
    """
    edits = Edits()
    final: list[Tensor] = []
    with apply(loaded.model, plan), Hooks() as hooks:
        try:
            for module, outputs in dense.front.items():
                edits.set_instance_attribute(module, "forward", _Played(outputs))
            for layer, output in zip(list(stack.layers)[:first], dense.outputs, strict=False):
                edits.set_instance_attribute(layer, "forward", _Stub(output))
            hooks.after(stack.layers[-1], lambda output: final.append(hidden_of(output)))
            logits = prefill(loaded, batch)
        finally:
            edits.undo()
    return logits, final[0]


def prefixes_can_be_shared(loaded: LoadedModel, stack: DecoderStack, dense: DensePass, batch: Batch) -> tuple[str, int]:
    """Why replays of this model are not exact, empty when they are; and how many decoder layers finding out ran.

    Replays of the dense plan must give the dense pass's logits, bit by bit. A family whose layers read what earlier
    ones computed, beyond the hidden state, is found out here.
    """
    if any(shares_keys(layer) for layer in stack.layers):
        return "later layers use keys and values of earlier ones", 0
    layers, executed = len(stack.layers), 0
    for first in sorted({layers // 2, layers - 1}):
        executed += layers - first
        try:
            logits, _ = replay(loaded, stack, dense, batch, SkipPlan.dense(layers), first)
        except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            return f"a replay from layer {first} failed ({type(error).__name__})", executed
        if dense.logits is None or not torch.equal(logits, dense.logits):
            return f"a replay from layer {first} gave other logits than the dense pass", executed
    return "", executed


def _front_modules(stack: DecoderStack) -> list[nn.Module]:
    """Modules beside the way from the model down to the decoder: vision towers, projectors, heads."""
    way = list(dict.fromkeys(ancestors(stack.model, stack.path)))
    return [child for module in way[:-1] for child in module.children() if all(child is not other for other in way)]


class _Played:
    """A forward that gives recorded outputs back, one after the other."""

    def __init__(self, outputs: list[Any]) -> None:
        self._left = iter(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return _copied(next(self._left))
        except StopIteration:
            raise RuntimeError("a module before the decoder was called more often than in the dense pass") from None


class _Stub:
    """A decoder layer's forward that gives the dense pass's output back."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return with_hidden(self._output, hidden_of(self._output).clone())


def _copied(output: Any) -> Any:
    """Return a shallow copy of a container, since callers may put things into it; tensors stay the same ones."""
    return output if isinstance(output, Tensor) else copy.copy(output)
