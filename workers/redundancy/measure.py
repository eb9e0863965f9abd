"""Measure a shard of the calibration split: the passes, in order, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workers.device.memory import OUT_OF_MEMORY, is_out_of_memory
from workers.errors import MeasurementError
from workers.layerwise.hooks import Hooks, hidden_of
from workers.messages import DEFAULT_BATCH_SIZE, KindSums, RedundancySums
from workers.models.fed_answers import NoPromptsReturnedError
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import NAN_LOGITS
from workers.runtime.families import describe
from workers.runtime.locate import locate
from workers.tasks import Task

from .answers import answers_change_prompts, with_answers
from .attention import VisionAttention
from .batches import Batch, batches
from .collectors import COLLECTORS, Operators, StatesCollector
from .interventions import Interventions
from .kinds import KINDS, ON_FEW, TRIED, TRIED_SHARDS
from .replay import AnswerLogitsError, DensePass, NotANumberError, prefill, prefixes_can_be_shared, record_dense_pass

_UNSHAREABLE: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Why a model's prefixes cannot be shared (empty: they can), found out once for each model that a process holds."""

_UNANSWERED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Why harm is measured at a model's first answer token alone (empty: at all of them), found out once likewise."""

INTERVENTION_KINDS = frozenset({"propagation", *TRIED, "withdrawal"})


def measure_redundancy(
    loaded: LoadedModel,
    task: Task,
    kinds: tuple[str, ...],
    *,
    shard: int = 0,
    shards: int = 1,
    n_samples: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> RedundancySums:
    """Measure ``kinds`` (names of ``KINDS``) over ``samples[:n_samples][shard::shards]`` of the calibration split.

    Samples that fail (image, processor, NaN in the logits, memory) are left out, not counted, and listed.

    Raises:
        MeasurementError: no such kind, or decoder layers that do not pass
            ``[batch, tokens, hidden]`` states of the prompt's length.
    """
    unknown = sorted(set(kinds) - KINDS.keys())
    if unknown:
        raise MeasurementError(f"no such kind of measurement: {', '.join(unknown)}; known are {', '.join(KINDS)}")
    failed: dict[str, str] = {}
    while True:  # what a batch added before it failed cannot be taken back: the shard begins anew
        measurement = _Measurement(loaded, task, kinds, shard, shards)
        samples = [each for each in task.calibration[:n_samples][shard::shards] if each.id not in failed]
        ids, batch = measurement.descriptor.vision_token_ids, None
        try:
            with torch.inference_mode():
                for batch in batches(loaded, task, samples, measurement.stack, ids, batch_size, failed):
                    measurement.add(batch)
            return replace(measurement.sums(), failed_samples=failed)
        except NotANumberError as error:
            failed |= dict.fromkeys(error.samples, NAN_LOGITS)
        except (RuntimeError, MemoryError) as error:
            if batch is None or not is_out_of_memory(error):
                raise
            if batch.size == 1:
                failed[batch.samples[0].id] = OUT_OF_MEMORY
            batch_size = max(1, batch.size // 2)


class _Measurement:
    """The passes over one shard and what they add up to."""

    def __init__(self, loaded: LoadedModel, task: Task, kinds: tuple[str, ...], shard: int, shards: int) -> None:
        self.loaded, self.task, self.stack = loaded, task, locate(loaded.model)
        self.descriptor = describe(loaded.model)
        self.layers = self.descriptor.num_layers
        self.kinds = kinds
        self.samples = 0
        self.attended = False
        """Whether the attention of the batch at hand was read while its answers were generated."""
        self.executions = {"states": 0.0}
        self.notes: list[str] = []
        self.collectors: dict[str, StatesCollector] = {
            kind: COLLECTORS[kind](self.layers, shards) for kind in kinds if kind in COLLECTORS
        }
        self.attention = VisionAttention(self.layers) if "attention" in kinds else None
        wanted = INTERVENTION_KINDS & set(kinds)
        tries = shard % TRIED_SHARDS == 0
        self.interventions = (
            Interventions(loaded, self.stack, self.descriptor, set(wanted), tries=tries) if wanted else None
        )
        self.intervenes = bool(wanted if tries else wanted.difference(ON_FEW))

    def add(self, batch: Batch) -> None:
        """Run all passes over one batch."""
        self.samples += batch.size
        self.attended = False
        if self.intervenes:
            batch = self._answered(batch)
        if self.collectors or self.intervenes:
            dense, changes = self._dense_pass(batch)
            if self.intervenes:
                self._intervene(batch, dense, changes)
        if self.attention is not None and not self.attended:
            self._count("attention", batch.work * self.layers)
            with self.attention.listening(self.stack, batch):
                prefill(self.loaded, batch)

    def _answered(self, batch: Batch) -> Batch:
        """Put the answers behind the prompts; a choice has no answer of its own, and some families allow it not."""
        model = self.loaded.model
        if self.task.spec.is_choice or _UNANSWERED.get(model):
            if reason := _UNANSWERED.get(model):
                self._note(f"harm is measured at the answer's first token alone: {reason}")
            return batch
        self.attended = self.attention is not None
        attending = self.attention.listening(self.stack, batch) if self.attention is not None else nullcontext()
        try:
            with attending:
                answered = with_answers(self.loaded, self.task, batch, self.descriptor.vision_token_ids)
        except NoPromptsReturnedError as error:
            _UNANSWERED[model] = str(error)
            return self._answered(batch)
        self._count("answers", answered.work * self.layers)  # decoding feeds every token once
        if model not in _UNANSWERED and answered.answer_tokens:
            self._count("check", (batch.work + answered.work) * self.layers)
            try:
                changed = answers_change_prompts(self.loaded, batch, answered)
                _UNANSWERED[model] = "the prompt's tokens see the answer's" if changed else ""
            except AnswerLogitsError as error:
                _UNANSWERED[model] = str(error)
        return self._answered(batch) if _UNANSWERED.get(model) else answered

    def _count(self, name: str, executions: float) -> None:
        self.executions[name] = self.executions.get(name, 0) + executions

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _dense_pass(self, batch: Batch) -> tuple[DensePass, list[Tensor]]:
        changes: list[Tensor] = []
        for collector in self.collectors.values():
            collector.begin(batch)
        self._count("states", batch.work * self.layers)
        if not self.intervenes:
            dense = DensePass()
            with self._watching(batch, None):
                dense.logits = prefill(self.loaded, batch)
        else:
            with record_dense_pass(self.stack) as dense, self._watching(batch, changes):
                dense.logits = prefill(self.loaded, batch)
        for collector in self.collectors.values():
            collector.end(dense.logits[:, 0])
        return dense, changes

    @contextmanager
    def _watching(self, batch: Batch, changes: list[Tensor] | None) -> Iterator[None]:
        """Show every decoder layer's input and output to the collectors; one input state is held at a time."""
        held: dict[int, Tensor] = {}
        expected = (batch.size, batch.tokens)

        def before(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[0] if args else kwargs["hidden_states"]
            if state.dim() != 3 or tuple(state.shape[:2]) != expected:
                raise MeasurementError(
                    f"layer {layer}: the hidden state has shape {tuple(state.shape)}, expected {expected} and hidden"
                )
            held[layer] = state.to(torch.float32, copy=True)  # a layer may write into its input

        def after(layer: int, output: Any) -> None:
            first, second = held.pop(layer), hidden_of(output).float()
            if changes is not None:
                changes.append((second - first).to(hidden_of(output).dtype))
            for collector in self.collectors.values():
                collector.layer(layer, first, second)

        operators = self.collectors.get("operators")
        listening = operators.listening(self.stack) if isinstance(operators, Operators) else nullcontext()
        with listening, Hooks() as hooks:
            for number, layer in enumerate(self.stack.layers):
                hooks.before(layer, partial(before, number))
                hooks.after(layer, partial(after, number))
            yield

    def _intervene(self, batch: Batch, dense: DensePass, changes: list[Tensor]) -> None:
        assert self.interventions is not None
        if self.loaded.model not in _UNSHAREABLE:
            reason, executed = prefixes_can_be_shared(self.loaded, self.stack, dense, batch)
            _UNSHAREABLE[self.loaded.model] = reason
            self._count("check", executed * batch.work)
        reason = _UNSHAREABLE[self.loaded.model]
        if reason:
            self.interventions.shared_prefixes = False
            self._note(f"prefixes are not shared between interventions: {reason}")
        self.interventions.add(batch, dense, changes)

    def sums(self) -> RedundancySums:
        found: dict[str, KindSums] = {kind: collector.sums() for kind, collector in self.collectors.items()}
        executions = dict(self.executions)
        if self.attention is not None:
            found["attention"] = self.attention.sums()
        if self.interventions is not None:
            found.update(self.interventions.sums())
            executions.update(self.interventions.executions)
        return RedundancySums(
            num_layers=self.layers,
            samples=self.samples,
            kinds={kind: found[kind] for kind in self.kinds},
            layer_executions=executions,
            notes=tuple(self.notes),
        )
