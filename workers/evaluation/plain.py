"""Evaluate plans plainly: apply the plan, generate greedily batch by batch, decode, score.

In multiple choice the options are fed batch by batch, and the likeliest one is the answer.
Nothing is shared between plans but the processed inputs; faster paths are held to this one's numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch

from workers.compensation.compensator import Compensator
from workers.compensation.recipe import CompensationError
from workers.device.memory import OUT_OF_MEMORY, is_out_of_memory
from workers.lru import LruCache
from workers.messages import DEFAULT_BATCH_SIZE, EvaluatePlans, Evaluation, EvaluationFailure, Evaluations
from workers.models.greedy import decode_greedily
from workers.models.inputs import PreparedBatch, prepare_batch
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import NAN_LOGITS, Choice, Likelihood, join, one_by_one, option_likelihoods
from workers.models.ties import end_tokens
from workers.runtime import apply
from workers.runtime.folding import Maps
from workers.runtime.plan import PlanError, SkipPlan
from workers.tasks import Sample, Task, TaskSpec
from workers.tasks.metrics import METRICS
from workers.text import describe_error

DEFAULT_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Answers:
    """Decoded answers by sample id, and why the other samples have none."""

    texts: dict[str, str]
    failed: dict[str, str]
    tied: frozenset[str] = frozenset()
    """Samples whose answer hung on logits closer than rounding; :mod:`workers.models.ties`."""
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What was generated, up to the end token and without it."""
    likelihoods: dict[str, tuple[Likelihood, ...]] = field(default_factory=dict)
    """Where the task is to choose: by sample its options', and ``texts`` holds the option that its metric takes."""

    def joined(self, other: Answers) -> Answers:
        """Join these answers and ``other``'s, which take precedence."""
        return Answers(
            self.texts | other.texts,
            self.failed | other.failed,
            self.tied | other.tied,
            self.tokens | other.tokens,
            self.likelihoods | other.likelihoods,
        )


class PlainEvaluator:
    """Evaluate plans of one model on one task.

    What a plan scores on a sample does not depend on the other samples: where a tie was met, the sample is asked again
    alone. ``batch_size`` is halved for good when memory runs out. Processed inputs are kept between plans, up to
    ``cache_bytes``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: Task,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.loaded, self.task = loaded, task
        self.compensator = Compensator(loaded, task)
        self.batch_size = batch_size
        self.prepared: LruCache[tuple[str, ...], PreparedBatch] = LruCache(cache_bytes, lambda batch: batch.nbytes)
        """Prepared batches, by the ids of their samples."""

    def evaluate_all(self, request: EvaluatePlans) -> Evaluations:
        """Score the plans of a request one after another; one that cannot be scored does not stop the others.

        Raises:
            TaskError: no such split.
        """
        self.task.split(request.split)
        results: list[Evaluation | EvaluationFailure] = []
        for text in request.plans:
            try:
                plan = SkipPlan.parse(text)
                maps = self.compensator.maps(plan, request.compensation, request.artifact_of(text))
                result = self.evaluate(plan, request.split, request.n_samples, start=request.start, maps=maps)
                results.append(replace(result, compensation=request.compensation))
            except (PlanError, CompensationError, RuntimeError, MemoryError) as error:
                results.append(EvaluationFailure(text, describe_error(error, PlanError)))
        return Evaluations(tuple(results))

    def evaluate(
        self, plan: SkipPlan, split: str, n_samples: int | None = None, *, start: int = 0, maps: Maps | None = None
    ) -> Evaluation:
        """Score a plan on the samples from ``start`` up to ``n_samples`` of a split (to its end when ``None``).

        ``maps`` are folded into the weights before the plan's gaps while it runs.

        A sample fails when its image cannot be decoded, when the processor refuses it, when its logits hold NaN, or
        when it does not fit into memory alone; what it then counts for says :func:`excluded_samples`.

        Raises:
            TaskError: no such split.
            PlanError: the model cannot take the plan.
        """
        started = time.perf_counter()
        samples = self.task.split(split)[start:n_samples]
        answers = self.answer(plan, samples, maps)
        scores = [scores_of(self.task.spec, sample, answers) for sample in samples]
        marked = excluded_samples(plan, answers.failed)
        return Evaluation(
            plan=plan.text,
            split=split,
            sample_ids=tuple(sample.id for sample in samples),
            **summarise(self.task.spec, {s.id: each for s, each in zip(samples, scores, strict=True)}, marked),
            failed_samples=answers.failed,
            seconds=time.perf_counter() - started,
            layer_executions=len(plan.kept) * (len(samples) - len(answers.failed)),
            near_ties=len(answers.tied),
        )

    def answer(self, plan: SkipPlan, samples: Sequence[Sample], maps: Maps | None = None) -> Answers:
        """Generate the model's answers under a plan, batch by batch; tied samples once more alone."""
        with torch.inference_mode(), apply(self.loaded.model, plan, maps):
            answers = self._answers(samples)
            alone = self._answers([sample for sample in samples if sample.id in answers.tied], alone=True)
        return answers.joined(alone)

    def answer_alone(self, plan: SkipPlan, samples: Sequence[Sample], maps: Maps | None = None) -> Answers:
        """Generate the model's answers under a plan, one sample (of a choice, one option) at a time."""
        with torch.inference_mode(), apply(self.loaded.model, plan, maps):
            return self._answers(samples, alone=True)

    def _answers(self, samples: Sequence[Sample], *, alone: bool = False) -> Answers:
        asked = one_by_one(samples) if self.task.spec.is_choice else samples
        answers = self._answer_chunks(([each] for each in asked) if alone else self._chunks(asked))
        return _chosen(self.task.spec, samples, answers, alone=alone) if self.task.spec.is_choice else answers

    def _answer_chunks(self, chunks: Iterable[Sequence[Sample]]) -> Answers:
        answers = Answers({}, {})
        for chunk in chunks:
            key = tuple(sample.id for sample in chunk)
            batch = self.prepared.get(key) or self.prepared.put(key, prepare_batch(self.loaded, self.task, chunk))
            answers = answers.joined(Answers({}, batch.failed))
            if batch.inputs is not None:
                answers = answers.joined(self._generate(batch, key))
        return answers

    def _chunks(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        position = 0
        while position < len(samples):
            size = self.batch_size  # may shrink before the next chunk
            yield samples[position : position + size]
            position += size

    def _generate(self, batch: PreparedBatch, key: tuple[str, ...]) -> Answers:
        """Generate for a batch prepared under ``key``; out of memory: halve the batch size and go on in halves."""
        assert batch.inputs is not None
        try:
            if self.task.spec.is_choice:
                likelihoods, failed = option_likelihoods(self.loaded, self.task, batch)
                return Answers({}, failed, likelihoods={key: (each,) for key, each in likelihoods.items()})
            return generate_answers(self.loaded, self.task, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, so that the failed attempt's tensors are no longer held by its traceback.
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch.samples) == 1:
            return Answers({}, {batch.samples[0].id: OUT_OF_MEMORY})
        self.prepared.drop(key)
        self.batch_size = min(self.batch_size, len(batch.samples) // 2)
        return self._answer_chunks(self._chunks(batch.samples))


def generate_answers(loaded: LoadedModel, task: Task, batch: PreparedBatch) -> Answers:
    """Generate and decode the answers of one batch under whatever plan is applied to the model."""
    prompt, sequences, watch = decode_greedily(loaded, batch, task.spec.answer.max_new_tokens)
    new, ends = _without_prompt(sequences, prompt), end_tokens(loaded.model)
    decoded = loaded.processor.batch_decode(new, skip_special_tokens=True)
    texts, failed, tokens = {}, {}, {}
    for sample, text, row, is_nan in zip(batch.samples, decoded, new.tolist(), watch.nan.tolist(), strict=True):
        if is_nan:
            failed[sample.id] = NAN_LOGITS
        else:
            texts[sample.id] = text.strip()
            tokens[sample.id] = tuple(takewhile(lambda token: token not in ends, row))
    alone = len(batch.samples) == 1
    tied = () if alone else (s.id for s, tie in zip(batch.samples, watch.tied.tolist(), strict=True) if tie)
    return Answers(texts, failed, frozenset(tied) - failed.keys(), tokens)


def _without_prompt(tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Cut the prompt off the generated ``[batch, tokens]``; a few families return the new tokens alone."""
    length = prompt.shape[1]
    if tokens.shape[1] >= length and torch.equal(tokens[:, :length], prompt):
        return tokens[:, length:]
    return tokens


def scores_of(spec: TaskSpec, sample: Sample, answers: Answers) -> tuple[float, ...]:
    """Return the metric and the secondary metrics of an answer; 0 where there is none."""
    if spec.is_choice and sample.id in answers.likelihoods:
        likelihoods = answers.likelihoods[sample.id]
        return tuple(Choice.of(name, sample.choices, likelihoods).score(sample) for name in spec.metrics)
    if sample.id not in answers.texts:
        return (0.0,) * len(spec.metrics)
    return tuple(METRICS[name](answers.texts[sample.id], sample.answers) for name in spec.metrics)


def excluded_samples(plan: SkipPlan, failed: Mapping[str, str]) -> frozenset[str]:
    """Tell which failed samples are left out: all but those whose logits hold NaN under a plan that is not dense.

    These are the plan's own fault, and wrong answers of it; where dense gives NaN too, dense's mark leaves them out.
    """
    return frozenset(sample for sample, reason in failed.items() if plan.is_dense or reason != NAN_LOGITS)


def summarise(spec: TaskSpec, scores: Mapping[str, Sequence[float]], marked: frozenset[str]) -> dict[str, Any]:
    """Return the scores by the metric, NaN for marked samples, and the means by the secondary metrics of the others."""
    counted = [each for sample, each in scores.items() if sample not in marked]
    return {
        "scores": tuple(math.nan if sample in marked else each[0] for sample, each in scores.items()),
        "secondary": {name: _mean([each[1 + i] for each in counted]) for i, name in enumerate(spec.secondary)},
    }


def _chosen(spec: TaskSpec, samples: Sequence[Sample], answers: Answers, *, alone: bool) -> Answers:
    """Return the samples' answers from those about single options; with ``alone`` tied options count too."""
    likelihoods, failed = join(samples, {key: each for key, (each,) in answers.likelihoods.items()}, answers.failed)
    texts, tied = {}, set()
    for sample in samples:
        if sample.id in likelihoods:
            chosen = [Choice.of(name, sample.choices, likelihoods[sample.id]) for name in spec.metrics]
            texts[sample.id] = chosen[0].option
            if not alone and any(choice.is_open(sample) for choice in chosen):
                tied.add(sample.id)
    return Answers(texts, failed, frozenset(tied), likelihoods=likelihoods)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
