"""Prepare calibration samples: the decoder's calls, and the dense model's states as the targets of every map.

A sample is its prompt with the dense model's own answer behind it (the option that it chooses, where it is to choose),
so that image, prompt and answer tokens all count. The tower's work is done once: the decoder's call is
kept for each batch.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from workers.layerwise.hooks import Hooks, hidden_of
from workers.models.fed_answers import NoPromptsReturnedError, append_answers, generate_fed_answers
from workers.models.inputs import PreparedBatch, prepare_batch
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import chosen_tokens
from workers.models.prompts import to_device
from workers.runtime.edits import Edits
from workers.runtime.families import describe
from workers.runtime.folding import FoldingError, added_share, fold_site
from workers.runtime.gaps import PARTS, Part
from workers.runtime.locate import DecoderStack, locate
from workers.runtime.plan import Action
from workers.runtime.sublayers import block_of, leave_out
from workers.tasks import Sample, Task
from workers.tasks.joint import asked_apart
from workers.text import describe_error

from .recipe import CompensationError

FIRST_BATCH = 8
BATCH_TOKENS = 4096
LARGEST_BATCH = 64
"""Samples of the first forward pass, about as many tokens in later ones, and most samples of one. Fixed, since rounding
depends on them and fits are to be repeatable bit by bit."""
MEMORY_BUDGET = 4 << 30
"""Bytes that the dense model's states at all layers may take."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Some samples, padded to ``[batch, tokens]``: the decoder's call, and the dense states of the kept tokens."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    vision: Tensor
    """Vision tokens, bool ``[batch, tokens]``."""
    answers: Tensor
    """Tokens from which the answer is read, the prompt's last one and the answer's own, bool ``[batch, tokens]``."""
    kept: Tensor
    """Places of the kept tokens in the flattened batch, ascending ``[kept]``."""
    targets: tuple[Tensor, ...]
    """The dense model's state behind every layer, ``[kept, hidden]`` each, in the model's dtype."""
    between: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer, what the decoder itself adds behind it before the next layer runs (features of images),
    ``[kept, hidden]``; layers behind which nothing is added are not there."""
    general: bool = False
    """Whether these are general text instead of the task's samples."""
    part: int = 0
    """Of a joint task, the number of the part that the samples are of."""

    @property
    def kept_vision(self) -> Tensor:
        """Which kept tokens are vision tokens, bool ``[kept]``."""
        return self.vision.flatten()[self.kept]

    @property
    def kept_answers(self) -> Tensor:
        """Which kept tokens the answer is read from, bool ``[kept]``."""
        return self.answers.flatten()[self.kept]

    def wanted(self, layer: int, end: int) -> Tensor:
        """Return what a gap from ``layer`` to ``end`` should leave behind ``layer``, ``[kept, hidden]``, float64.

        That is the dense state behind ``end``, without what the decoder adds behind ``layer`` under the plan too.
        """
        target = self.targets[end].double()
        return target - self.between[layer].double() if end > layer and layer in self.between else target


@dataclass(frozen=True)
class Holders:
    """Which layers can hold a map at the end of one of their parts."""

    shares: dict[int, float] = field(default_factory=dict)
    """By layer, the factor with which the part's output enters the residual stream."""
    refusals: dict[int, str] = field(default_factory=dict)
    """By layer, why it cannot hold a map."""


@dataclass(frozen=True)
class Calibration:
    """The calibration batches of one model and task, and what its layers can hold."""

    batches: tuple[CalibrationBatch, ...]
    samples: tuple[str, ...]
    tokens: int
    """All tokens of these samples, padding left out."""
    kept: int
    """Tokens whose states fit into the memory budget; the sums run over these."""
    holders: dict[Part, Holders]
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples that were left out, and why."""
    text_share: float = 0.0
    """The weight of the batches of general text in the fit."""

    @property
    def text_tokens(self) -> int:
        """Kept tokens of general text."""
        return sum(len(batch.kept) for batch in self.batches if batch.general)

    @property
    def device(self) -> torch.device:
        """Where its states lie."""
        return self.batches[0].kept.device

    def require(self, layer: int, part: Part = "mlp") -> float:
        """Return the share of a layer's part. Raises :class:`CompensationError` with the reason if it holds no map."""
        own = self.holders[part]
        if layer in own.refusals:
            raise CompensationError(own.refusals[layer])
        return own.shares[layer]


@dataclass(frozen=True)
class GeneralText:
    """General text that is mixed with the task's samples: windows of tokens ``[tokens]``, and their weight in total."""

    windows: Sequence[Tensor]
    share: float


NO_TEXT = GeneralText((), 0.0)


def calibrate(
    loaded: LoadedModel,
    task: Task,
    *,
    tokens: int,
    seed: int = 0,
    text: GeneralText = NO_TEXT,
    memory_budget: int = MEMORY_BUDGET,
) -> Calibration:
    """Run the dense model over whole calibration samples, one an image first, until ``tokens`` tokens are reached.

    Of a joint task every part has an equal share of the tokens, and is asked and answered as that part is. Behind them
    it runs over ``text``, whose tokens come on top.

    Where the states of all tokens at all layers exceed ``memory_budget`` bytes, a part of the tokens is kept: as many
    vision tokens as text tokens as tokens that answer (and as tokens of ``text``), as far as there are so
    many, drawn at random with ``seed``.

    Raises :class:`CompensationError` when no sample can be read, or the decoder's sequence is not the prompt's.
    """
    stack = locate(loaded.model)
    failed: dict[str, str] = {}
    parts = asked_apart(task)
    prepared: list[_Sequences] = []
    numbers: list[int] = []
    for number, part in enumerate(parts):
        share = max(1, tokens * (number + 1) // len(parts) - tokens * number // len(parts))
        own = list(_prepare(loaded, part, share, failed))
        if not own:
            raise CompensationError(f"task {part.name}: no calibration sample can be read, so no map can be fitted")
        prepared += own
        numbers += [number] * len(own)
    task_batches = len(prepared)
    prepared += _text_batches(text.windows)
    vision_ids = torch.tensor(describe(loaded.model).vision_token_ids)
    real = [each.inputs["attention_mask"].bool() for each in prepared]
    vision = [
        torch.isin(each.inputs["input_ids"], vision_ids) & mask for each, mask in zip(prepared, real, strict=True)
    ]
    kinds = torch.cat([_kinds(*three)[three[0]] for three in zip(real, vision, prepared, strict=True)])
    kinds[sum(int(mask.sum()) for mask in real[:task_batches]) :] = GENERAL
    total = len(kinds)
    chosen = _choose(kinds, _affordable(stack, loaded.model.dtype, memory_budget), seed)
    prover = _Prover(stack)
    batches, passed = [], 0
    for number, (each, mask, seen) in enumerate(zip(prepared, real, vision, strict=True)):
        indices = mask.flatten().nonzero().flatten()
        here = chosen[(chosen >= passed) & (chosen < passed + len(indices))] - passed
        passed += len(indices)
        general = number >= task_batches
        with prover.proving(), _without_image() if general else nullcontext():
            batch = _dense_pass(loaded, stack, each.inputs, seen, each.answers, indices[here])
        batches.append(replace(batch, general=general, part=0 if general else numbers[number]))
    return Calibration(
        batches=tuple(batches),
        samples=tuple(sample.id for each in prepared for sample in each.samples),
        tokens=total,
        kept=len(chosen),
        holders=prover.holders,
        failed_samples=failed,
        text_share=text.share,
    )


@contextmanager
def _without_image() -> Iterator[None]:
    """Raise CompensationError where the model does not take text without an image."""
    try:
        yield
    except CompensationError:
        raise
    except Exception as error:  # model code of any family raises all kinds here
        raise CompensationError(text_refused(error)) from error


def text_refused(error: Exception) -> str:
    """Word why maps cannot be fitted on a mixture."""
    return f"the model does not take text without an image ({describe_error(error)}); set compensation.text_share: 0"


def _affordable(stack: DecoderStack, dtype: torch.dtype, memory_budget: int) -> int:
    return max(1, memory_budget // (len(stack.layers) * int(stack.text_config.hidden_size) * dtype.itemsize))


VISION, TEXT, ANSWER, GENERAL = range(4)


def _kinds(real: Tensor, vision: Tensor, sequences: _Sequences) -> Tensor:
    """Of every token, ``[batch, tokens]``: vision, the prompt's text, or read for the answer."""
    kinds = torch.where(vision, VISION, TEXT)
    return torch.where(sequences.answers & real, ANSWER, kinds)


def _choose(kinds: Tensor, affordable: int, seed: int) -> Tensor:
    """Ascending numbers of the kept tokens among all: equally many of every kind, as far as there are so many."""
    if len(kinds) <= affordable:
        return torch.arange(len(kinds))
    generator = torch.Generator().manual_seed(seed)
    indices = sorted(((kinds == kind).nonzero().flatten() for kind in (VISION, TEXT, ANSWER, GENERAL)), key=len)
    chosen: list[Tensor] = []
    for number, own in enumerate(indices):  # the rarest first: what it leaves over is the others'
        share = (affordable - sum(map(len, chosen))) // (len(indices) - number)
        chosen.append(own[torch.randperm(len(own), generator=generator)[:share]])
    return torch.cat(chosen).sort().values


# Sequences ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequences:
    """Prompts ``[batch, tokens]``, padded on the left, with answers behind them, padded on the right."""

    samples: tuple[Sample, ...]
    inputs: BatchFeature
    prompt: int
    """Width of the prompts."""

    @property
    def answers(self) -> Tensor:
        """Tokens from which the answer is read, bool ``[batch, tokens]``."""
        found: Tensor = self.inputs["attention_mask"].bool().clone()
        found[:, : self.prompt - 1] = False
        return found


def _prepare(loaded: LoadedModel, task: Task, tokens: int, failed: dict[str, str]) -> Iterator[_Sequences]:
    """Batches of samples with their answers, as model inputs on the CPU, until the tokens are reached."""
    reached, samples = 0, by_image(task.calibration)
    start, size = 0, FIRST_BATCH
    while start < len(samples):
        batch = _with_answers(loaded, task, samples[start : start + size], failed)
        start += size
        if batch is None:
            continue
        size = min(LARGEST_BATCH, max(1, BATCH_TOKENS // batch.inputs["input_ids"].shape[1]))
        lengths = batch.inputs["attention_mask"].sum(1).cumsum(0) + reached
        needed = int((lengths < tokens).sum()) + 1
        if needed < len(batch.samples):
            batch = _with_answers(loaded, task, batch.samples[:needed], failed)
            assert batch is not None
        reached += int(batch.inputs["attention_mask"].sum())
        yield batch
        if reached >= tokens:
            return


def _text_batches(windows: Sequence[Tensor]) -> Iterator[_Sequences]:
    """Batches of windows of text of one length, as model inputs on the CPU; no token of theirs answers anything."""
    for width, same in groupby(windows, key=len):
        rows = torch.stack(list(same))
        for part in torch.split(rows, max(1, BATCH_TOKENS // width)):
            inputs = BatchFeature({"input_ids": part, "attention_mask": torch.ones_like(part)})
            yield _Sequences((), inputs, width + 1)


def by_image(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return the first sample of every image, then the second ones, and so on, else in the given order.

    Where attention is causal, image tokens before the question are the same for every question on the image: asking
    another image first gives more different tokens for the same work.
    """
    seen: Counter[str] = Counter()
    turns = []
    for sample in samples:
        turns.append(seen[sample.image_key])
        seen[sample.image_key] += 1
    return tuple(sample for _, sample in sorted(zip(turns, samples, strict=True), key=lambda pair: pair[0]))


def _with_answers(
    loaded: LoadedModel, task: Task, samples: Sequence[Sample], failed: dict[str, str]
) -> _Sequences | None:
    prepared = prepare_batch(loaded, task, samples)
    failed.update(prepared.failed)
    if prepared.inputs is None:
        return None
    with torch.inference_mode():
        answers, unanswered = (_choose_answers if task.spec.is_choice else _generate_answers)(loaded, task, prepared)
    if unanswered:  # what the model cannot answer has no states to fit maps to
        failed.update(unanswered)
        return _with_answers(loaded, task, [s for s in prepared.samples if s.id not in unanswered], failed)
    pad, prompt = loaded.processor.tokenizer.pad_token_id, prepared.inputs["input_ids"].shape[1]
    return _Sequences(prepared.samples, append_answers(prepared.inputs, answers, pad), prompt)


def _choose_answers(loaded: LoadedModel, task: Task, batch: PreparedBatch) -> tuple[list[Tensor], dict[str, str]]:
    """Return the tokens of the options that the model chooses, without the last; and why samples have none."""
    answers, failed = [], {}
    for sample in batch.samples:
        tokens, reason = chosen_tokens(loaded, task, sample)
        answers.append(torch.tensor(tokens[:-1], dtype=torch.long))
        if reason:
            failed[sample.id] = reason
    return answers, failed


def _generate_answers(loaded: LoadedModel, task: Task, batch: PreparedBatch) -> tuple[list[Tensor], dict[str, str]]:
    """Return the tokens that decoding feeds back, by sample; and why samples have none."""
    try:
        return generate_fed_answers(loaded, batch, task.spec.answer.max_new_tokens)
    except NoPromptsReturnedError as error:
        raise CompensationError(str(error)) from None


# The dense pass -----------------------------------------------------------------------------------------------------


def _dense_pass(
    loaded: LoadedModel, stack: DecoderStack, inputs: BatchFeature, vision: Tensor, answers: Tensor, kept: Tensor
) -> CalibrationBatch:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    states: dict[int, Tensor] = {}
    between: dict[int, Tensor] = {}
    device = loaded.device
    indices = kept.to(device)

    def note_change(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        left = states[index - 1]
        change = entering.reshape(-1, entering.shape[-1])[indices].to(left.device) - left
        if bool(change.any()):
            between[index - 1] = change

    def note_state(index: int, output: Any) -> None:
        state = hidden_of(output)
        if state.dim() != 3 or state.shape[:2] != vision.shape:
            raise CompensationError(
                f"the decoder's states are {list(state.shape)} where prompts are {list(vision.shape)}: maps need one "
                "state per token of the prompt"
            )
        states[index] = state.reshape(-1, state.shape[-1])[indices].clone()

    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        options["logits_to_keep"] = 1
    with Hooks() as hooks, torch.inference_mode():
        hooks.before(stack.owner, lambda args, kwargs: calls.append((args, dict(kwargs))))
        for index, layer in enumerate(stack.layers):
            if index:
                hooks.before(layer, partial(note_change, index))
            hooks.after(layer, partial(note_state, index))
        loaded.model(**to_device(inputs, device, loaded.model.dtype), **options)
    if len(calls) != 1:
        raise CompensationError(f"the decoder ran {len(calls)} times in one forward pass, which maps do not allow for")
    args, kwargs = calls[0]
    targets = tuple(states[index] for index in range(len(stack.layers)))
    return CalibrationBatch(args, kwargs, vision.to(device), answers.to(device), indices, targets, between)


class _Prover:
    """Prove on the first batch that layers are residual + linear projection, by running each twice more.

    As often without its MLP, for maps at the end of its attention.
    """

    def __init__(self, stack: DecoderStack) -> None:
        self._stack, self._busy = stack, False
        self.holders: dict[Part, Holders] = {part: Holders() for part in PARTS}

    @contextmanager
    def proving(self) -> Iterator[None]:
        """While in here, layers that are not proven yet are when they run."""
        handles = []
        for index, layer in enumerate(self._stack.layers):
            if any(index in own.shares or index in own.refusals for own in self.holders.values()):
                continue
            hook = lambda module, args, kwargs, output, index=index: self._prove(index, module, args, kwargs)  # noqa: E731
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _prove(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if self._busy:
            return

        def run() -> Tensor:
            return hidden_of(layer.forward(*args, **kwargs))

        self._busy = True
        try:
            for part, own in self.holders.items():
                try:
                    site = fold_site(self._stack, index, part)
                    with nullcontext() if part == "mlp" else self._without_mlp(index, layer):
                        own.shares[index] = added_share(index, site, run)
                except FoldingError as error:
                    own.refusals[index] = str(error)
        finally:
            self._busy = False

    @contextmanager
    def _without_mlp(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Have a layer run without its MLP. Raises :class:`FoldingError` where it cannot."""
        edits = Edits()
        try:
            leave_out(edits, layer, block_of(layer, int(self._stack.text_config.hidden_size)), index, Action.SKIP_MLP)
            yield
        except FoldingError:
            raise
        except Exception as error:  # whatever the layer's code raises without it
            raise FoldingError(f"layer {index} cannot hold a map without its MLP: {describe_error(error)}") from error
        finally:
            edits.undo()
