"""Score plans on passages of general text: how far they predict the next token as the dense model does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from workers.compensation.compensator import Compensator
from workers.compensation.general_text import ordinary_tokens
from workers.compensation.recipe import CompensationError
from workers.device.memory import OUT_OF_MEMORY, is_out_of_memory
from workers.errors import MeasurementError
from workers.evaluation.divergence import DenseDistributions, pieces
from workers.evaluation.plain import summarise
from workers.lru import LruCache
from workers.messages import EvaluatePlans, Evaluation, EvaluationFailure, Evaluations
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import NAN_LOGITS
from workers.runtime import apply
from workers.runtime.folding import Maps
from workers.runtime.locate import locate
from workers.runtime.plan import PlanError, SkipPlan
from workers.tasks import Passage, TextTask
from workers.text import describe_error

MOST_TOKENS = 512
"""Tokens of a passage that are read; what is behind them is left out."""
TOO_SHORT = "it has fewer than two tokens, so nothing can be predicted"
"""Why a passage fails."""
NAN_OF_PLAN = "its logits hold NaN where the dense model's do not"
"""Why a plan fails on all passages: left out, the one would make it look better than it is."""


@dataclass
class PassageScores:
    """Per passage the share of its tokens, from the second on, that are predicted, and the mean KL(dense || plan)."""

    shares: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    """Why the plan cannot be scored; empty where it can."""

    def add(self, passage: str, logits: Iterator[Tensor], following: Sequence[int], dense: DenseDistributions) -> None:
        """Read the ``logits`` of a passage's positions, ``[positions, vocabulary]`` each, piece after piece.

        ``following`` are the tokens behind the positions, ``dense`` the dense model's distributions there.
        """
        right, divergence, first = 0, 0.0, 0
        for piece in logits:
            own = slice(first, first + len(piece))
            first = own.stop
            if bool(piece.isnan().any()):
                divergence = math.nan
                if not bool(dense.log_probabilities.isnan().any()):
                    self.broken = f"{NAN_OF_PLAN}, on {passage}"
                break
            right += int((piece.argmax(-1).cpu() == torch.tensor(following[own])).sum())
            divergence += float(dense.at(own).divergence(piece).double().sum())
        if math.isnan(divergence):
            self.failed[passage] = NAN_LOGITS
        else:
            self.shares[passage], self.kl[passage] = right / len(following), divergence / len(following)


class PassageEvaluator:
    """Evaluate plans of one model on general text, one plan and one passage after another.

    A passage is tokenised as the tokenizer begins every text, without special tokens of its own, and cut to 512 tokens
    and the model's positions. The score is an accuracy, and the KL divergence that of the dense model's 512 likeliest
    tokens and the rest as one (:class:`DenseDistributions`), in nats a token. Near ties are not decided apart: rounding
    may move a score by a token. A passage fails where the dense model's logits hold NaN, and its score and divergence
    are NaN then; a plan fails where its own do and the dense model's do not.

    The dense model's distributions are kept, up to ``cache_bytes``.
    """

    def __init__(
        self, loaded: LoadedModel, task: TextTask, compensator: Compensator, *, cache_bytes: int = 1 << 30
    ) -> None:
        self.loaded, self.task, self.compensator = loaded, task, compensator
        self._dense: LruCache[str, DenseDistributions] = LruCache(cache_bytes, lambda each: each.nbytes)
        self._tokens: dict[str, tuple[int, ...]] = {}

    @cached_property
    def _ordinary(self) -> frozenset[int]:
        return frozenset(ordinary_tokens(self.loaded).tolist())

    def tokens(self, passage: Passage) -> tuple[int, ...]:
        """Return the tokens of a passage that are read."""
        if passage.id not in self._tokens:
            tokenizer = self.loaded.processor.tokenizer
            own = tokenizer(passage.text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [*tokenizer("")["input_ids"], *(each for each in own if each in self._ordinary)]
            positions = getattr(locate(self.loaded.model).text_config, "max_position_embeddings", None) or MOST_TOKENS
            self._tokens[passage.id] = tuple(ids[: min(MOST_TOKENS, int(positions))])
        return self._tokens[passage.id]

    def evaluate_all(self, request: EvaluatePlans) -> Evaluations:
        """Score the plans of a request one after another; one that cannot be scored does not stop the others.

        Raises:
            TaskError: no such split.
        """
        passages = self.task.split(request.split)[request.start : request.n_samples]
        results: list[Evaluation | EvaluationFailure] = []
        for text in request.plans:
            started = time.perf_counter()
            try:
                plan = SkipPlan.parse(text)
                scores = self.scores(
                    plan, passages, self.compensator.maps(plan, request.compensation, request.artifact_of(text))
                )
            except (PlanError, CompensationError, MeasurementError, RuntimeError, MemoryError) as error:
                results.append(EvaluationFailure(text, describe_error(error, PlanError)))
                continue
            if scores.broken:
                results.append(EvaluationFailure(text, scores.broken))
                continue
            results.append(
                Evaluation(
                    plan=plan.text,
                    split=request.split,
                    sample_ids=tuple(each.id for each in passages),
                    **summarise(
                        (), {each.id: (scores.shares.get(each.id, 0.0),) for each in passages}, frozenset(scores.failed)
                    ),
                    failed_samples=scores.failed,
                    seconds=time.perf_counter() - started,
                    compensation=request.compensation,
                    kl=tuple(scores.kl.get(each.id, math.nan) for each in passages),
                    layer_executions=round(plan.executions * (len(passages) - len(scores.failed))),
                )
            )
        return Evaluations(tuple(results))

    def scores(self, plan: SkipPlan, passages: Sequence[Passage], maps: Maps | None = None) -> PassageScores:
        """Score a plan on passages.

        Raises:
            PlanError: the model cannot take the plan.
            MeasurementError: the model does not take text without an image.
        """
        found = PassageScores()
        for passage in passages:
            tokens = self.tokens(passage)
            if len(tokens) < 2:
                found.failed[passage.id] = TOO_SHORT
                continue
            try:
                dense = self.dense(passage)
                with torch.inference_mode(), apply(self.loaded.model, plan, maps):
                    found.add(passage.id, self._logits(tokens), tokens[1:], dense)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                found.failed[passage.id] = OUT_OF_MEMORY
        return found

    def dense(self, passage: Passage) -> DenseDistributions:
        """Return the dense model's distributions at a passage's positions.

        Raises:
            MeasurementError: the model does not take text without an image.
        """
        known = self._dense.get(passage.id)
        if known is not None:
            return known
        try:
            with torch.inference_mode():
                parts = [DenseDistributions.of(piece) for piece in self._logits(self.tokens(passage))]
        except Exception as error:  # model code of any family raises all kinds here
            if is_out_of_memory(error):
                raise
            raise MeasurementError(
                f"the model does not take text without an image ({describe_error(error)})"
            ) from error
        return self._dense.put(passage.id, DenseDistributions.joined(parts))

    def _logits(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Yield the logits at all positions but the last, in float32, piece after piece."""
        ids = torch.tensor([tokens], device=self.loaded.device)
        logits = self.loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        for piece in pieces(len(tokens) - 1, logits.shape[-1]):
            yield logits[0, piece].float()
