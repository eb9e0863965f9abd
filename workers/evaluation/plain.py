"""Evaluate plans plainly: apply the plan, generate greedily batch by batch, decode, score.

In multiple choice the options are fed batch by batch, and the likeliest one is the answer. With the dense model's
answers as targets these are fed, and a plan scores the share of their tokens that it would have drafted.
Nothing is shared between plans but the processed inputs; faster paths are held to this one's numbers.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from workers.compensation.compensator import Compensator
from workers.compensation.recipe import CompensationError
from workers.device.memory import OUT_OF_MEMORY, is_out_of_memory
from workers.evaluation.acceptance import STATISTICS, scores_of_agreement
from workers.lru import LruCache
from workers.messages import (
    DEFAULT_BATCH_SIZE,
    AnswerDense,
    DenseAnswers,
    EvaluatePlans,
    Evaluation,
    EvaluationFailure,
    Evaluations,
)
from workers.models.forced import force
from workers.models.greedy import decode_greedily
from workers.models.inputs import PreparedBatch, prepare_batch
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import NAN_LOGITS, Choice, Likelihood, join, one_by_one, option_likelihoods
from workers.models.prompts import to_device
from workers.models.ties import decides_ties, end_tokens, tie_bound
from workers.runtime import apply
from workers.runtime.families import describe
from workers.runtime.folding import Maps
from workers.runtime.plan import PlanError, SkipPlan
from workers.tasks import Sample, Task, TaskSpec
from workers.tasks.scoring import score_answer
from workers.text import describe_error

DEFAULT_CACHE_BYTES = 1 << 30

Targets = Mapping[str, tuple[int, ...] | None]
"""By sample, the dense model's own answer with the token that ends it; None where it gave none."""

NO_TARGET = "the dense model gave no answer to it"
"""Why a sample without a target fails."""


@dataclass(frozen=True)
class Answers:
    """Decoded answers by sample id, and why the other samples have none."""

    texts: dict[str, str]
    failed: dict[str, str]
    tied: frozenset[str] = frozenset()
    """Samples whose answer hung on logits closer than rounding; :mod:`workers.models.ties`."""
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What was generated, up to the end token and without it."""
    ends: dict[str, int] = field(default_factory=dict)
    """The end tokens; none where the limit of new tokens ended an answer."""
    agreement: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    """Where there are targets: by sample, whether each of the target's tokens is the likeliest behind those before."""
    likelihoods: dict[str, tuple[Likelihood, ...]] = field(default_factory=dict)
    """Where the task is to choose: by sample its options', and ``texts`` holds the option that its metric takes."""

    def target(self, sample: str) -> tuple[int, ...] | None:
        """Return all that was generated for a sample, the end token included; None where nothing was."""
        end = (self.ends[sample],) if sample in self.ends else ()
        return (*self.tokens[sample], *end) if sample in self.tokens else None

    def joined(self, other: Answers) -> Answers:
        """Join these answers and ``other``'s, which take precedence."""
        return Answers(
            self.texts | other.texts,
            self.failed | other.failed,
            self.tied | other.tied,
            self.tokens | other.tokens,
            self.ends | other.ends,
            self.agreement | other.agreement,
            self.likelihoods | other.likelihoods,
        )


class PlainEvaluator:
    """Evaluate plans of one model on one task.

    What a plan scores on a sample does not depend on the other samples: where a tie was met, the sample is asked again
    alone. ``batch_size`` is halved for good when memory runs out. Processed inputs are kept between plans, up to
    ``cache_bytes``. With ``targets`` plans are scored by how far they agree with them. ``compensator`` fits maps, by
    default to the task's own calibration split.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: Task,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        compensator: Compensator | None = None,
    ) -> None:
        self.loaded, self.task = loaded, task
        self.compensator = compensator or Compensator(loaded, task)
        self.batch_size = batch_size
        self.targets: Targets | None = None
        self.prepared: LruCache[tuple[str, ...], PreparedBatch] = LruCache(cache_bytes, lambda batch: batch.nbytes)
        """Prepared batches, by the ids of their samples."""

    def with_targets(self, targets: Targets) -> PlainEvaluator:
        """Return an evaluator by agreement with ``targets``, which shares the rest with this one."""
        other = copy.copy(self)
        other.targets = targets
        return other

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
        return self.graded(plan, split, samples, answers, time.perf_counter() - started)

    def answer_dense(self, request: AnswerDense) -> DenseAnswers:
        """Let the dense model answer samples of a split.

        Raises:
            TaskError: no such split.
        """
        started = time.perf_counter()
        samples = self.task.split(request.split)[request.start : request.stop]
        dense = SkipPlan.dense(describe(self.loaded.model).num_layers)
        answers = self.answer(dense, samples)
        evaluation = self.graded(dense, request.split, samples, answers, time.perf_counter() - started)
        return DenseAnswers(evaluation, tuple(answers.target(sample.id) for sample in samples))

    def graded(
        self, plan: SkipPlan, split: str, samples: Sequence[Sample], answers: Answers, seconds: float
    ) -> Evaluation:
        """Score a plan's answers to ``samples``, which took so many seconds."""
        scores = {sample.id: self.scores(sample, answers) for sample in samples}
        marked = excluded_samples(plan, answers.failed)
        return Evaluation(
            plan=plan.text,
            split=split,
            sample_ids=tuple(sample.id for sample in samples),
            **summarise(self.secondary, scores, marked),
            failed_samples=answers.failed,
            seconds=seconds,
            layer_executions=round(plan.executions * (len(samples) - len(answers.failed))),
            near_ties=len(answers.tied),
        )

    @property
    def secondary(self) -> tuple[str, ...]:
        """Names of what :meth:`scores` returns behind a sample's score."""
        return self.task.spec.secondary if self.targets is None else STATISTICS

    def scores(self, sample: Sample, answers: Answers) -> tuple[float, ...]:
        """Return a sample's score and its secondary ones."""
        if self.targets is None:
            return scores_of(self.task.spec, sample, answers)
        return self.agreement_scores(sample, answers.agreement.get(sample.id))

    def agreement_scores(self, sample: Sample, agrees: Sequence[bool] | None) -> tuple[float, ...]:
        """Return the same from a sample's agreement; without any, nothing of its answer is drafted."""
        assert self.targets is not None
        none = (False,) * len(self.targets[sample.id] or (0,))
        return scores_of_agreement(agrees or none, self.task.spec.answer.max_new_tokens)

    def answer(self, plan: SkipPlan | None, samples: Sequence[Sample], maps: Maps | None = None) -> Answers:
        """Generate the model's answers under a plan, batch by batch; tied samples once more alone.

        Without a plan the model answers as it is: one that holds a plan for good takes no other, not even dense.
        """
        with torch.inference_mode(), nullcontext() if plan is None else apply(self.loaded.model, plan, maps):
            answers = self._answers(samples)
            alone = self._answers([sample for sample in samples if sample.id in answers.tied], alone=True)
        return answers.joined(alone)

    def answer_alone(self, plan: SkipPlan, samples: Sequence[Sample], maps: Maps | None = None) -> Answers:
        """Generate the model's answers under a plan, one sample (of a choice, one option) at a time."""
        with torch.inference_mode(), apply(self.loaded.model, plan, maps):
            return self._answers(samples, alone=True)

    def _answers(self, samples: Sequence[Sample], *, alone: bool = False) -> Answers:
        failed = {} if self.targets is None else {s.id: NO_TARGET for s in samples if self.targets[s.id] is None}
        if self.targets is not None:
            asked: Sequence[Sample] = [sample for sample in samples if sample.id not in failed]
        else:
            asked = one_by_one(samples) if self.task.spec.is_choice else samples
        answers = self._answer_chunks(([each] for each in asked) if alone else self._chunks(asked))
        if self.targets is not None:
            return answers.joined(Answers({}, failed))
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
            if self.targets is not None:
                return agreement(self.loaded, batch, self.targets)
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
    new, ends = without_prompt(sequences, prompt), end_tokens(loaded.model)
    decoded = loaded.processor.batch_decode(new, skip_special_tokens=True)
    texts, failed, tokens, ended = {}, {}, {}, {}
    for sample, text, row, is_nan in zip(batch.samples, decoded, new.tolist(), watch.nan.tolist(), strict=True):
        if is_nan:
            failed[sample.id] = NAN_LOGITS
        else:
            texts[sample.id] = text.strip()
            length = next((number for number, token in enumerate(row) if token in ends), len(row))
            tokens[sample.id] = tuple(row[:length])
            if length < len(row):
                ended[sample.id] = row[length]
    alone = len(batch.samples) == 1
    tied = () if alone else (s.id for s, tie in zip(batch.samples, watch.tied.tolist(), strict=True) if tie)
    return Answers(texts, failed, frozenset(tied) - failed.keys(), tokens, ended)


def agreement(loaded: LoadedModel, batch: PreparedBatch, targets: Targets) -> Answers:
    """Feed the targets behind the prompts, under whatever plan is applied to the model.

    The token that counts is the one that generation would take, settings that change logits included.
    """
    assert batch.inputs is not None
    tokens = [targets[sample.id] or () for sample in batch.samples]
    inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
    rows = list(zip(batch.samples, read_agreement(loaded, inputs, tokens), strict=True))
    decided = len(rows) > 1 and decides_ties(loaded.model.dtype)
    return Answers(
        {},
        {sample.id: NAN_LOGITS for sample, own in rows if own.not_a_number},
        frozenset(sample.id for sample, own in rows if own.tied and decided and not own.not_a_number),
        agreement={sample.id: tuple(own.agrees) for sample, own in rows if not own.not_a_number},
    )


@dataclass
class Agreement:
    """Where the likeliest token is the one that was fed, and whether rounding may have decided that anywhere."""

    agrees: list[bool] = field(default_factory=list)
    tied: bool = False
    not_a_number: bool = False


def read_agreement(loaded: LoadedModel, inputs: Mapping[str, Any], tokens: Sequence[Sequence[int]]) -> list[Agreement]:
    """Feed each row's own tokens behind its prompt, and say where generation would have taken them."""
    found = [Agreement() for _ in tokens]
    dtype = loaded.model.dtype

    def read(step: int, following: list[int], logits: torch.Tensor, scores: torch.Tensor) -> None:
        values, best = scores.float().topk(2, dim=-1)
        bound = tie_bound(values[:, 0], dtype)
        own = scores.float().gather(1, torch.tensor(following, device=scores.device)[:, None])[:, 0]
        open_ones = (values[:, 0] - values[:, 1] <= bound) & (values[:, 0] - own <= bound)
        rows = zip(best[:, 0].tolist(), open_ones.tolist(), logits.isnan().any(-1).tolist(), strict=True)
        for row, (token, is_open, is_nan) in enumerate(rows):
            if step < len(tokens[row]):
                found[row].agrees.append(token == following[row])
                found[row].tied |= is_open
                found[row].not_a_number |= is_nan

    force(loaded.model, inputs, tokens, loaded.processor.tokenizer.pad_token_id, read)
    return found


def without_prompt(tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
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
    return score_answer(spec, sample, answers.texts[sample.id])


def excluded_samples(plan: SkipPlan, failed: Mapping[str, str]) -> frozenset[str]:
    """Tell which failed samples are left out: all but those whose logits hold NaN under a plan that is not dense.

    These are the plan's own fault, and wrong answers of it; where dense gives NaN too, dense's mark leaves them out.
    """
    return frozenset(sample for sample, reason in failed.items() if plan.is_dense or reason != NAN_LOGITS)


def summarise(
    secondary: Sequence[str], scores: Mapping[str, Sequence[float]], marked: frozenset[str]
) -> dict[str, Any]:
    """Return the scores, NaN for marked samples, and the means of the others' secondary scores by name."""
    counted = [each for sample, each in scores.items() if sample not in marked]
    return {
        "scores": tuple(math.nan if sample in marked else each[0] for sample, each in scores.items()),
        "secondary": {name: _mean([each[1 + i] for each in counted]) for i, name in enumerate(secondary)},
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
