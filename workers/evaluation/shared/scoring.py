"""Score plans from their final-layer states, and continue decoding the answers that are not yet decided.

Chunks are walked beside each other. A plan's end holds few tokens in each of them, and matrix products of few tokens
are slow: logits are taken, and open answers decoded on, for all of them at once. Where the task is to choose, each
option is a branch behind its question, and all of one question stand in the same row. Where the dense model's own
answers are the targets, they are the drafts, and nothing is decoded on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, TypeVar

import torch
from torch import Tensor

from workers.errors import TaskError
from workers.evaluation.plain import PlainEvaluator, Targets
from workers.layerwise.decoder import Decoder, Keys, NotExactError
from workers.layerwise.trie import build_trie
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import Choice, Likelihood, option_tokens, token_likelihoods
from workers.models.ties import decides_ties, end_tokens
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.tasks import Passage, Sample, TaskSpec

from .answers import AnswerScorer, GreedyAnswer, GreedyTokens, grade_answer, longest_answer
from .continuation import Continuation
from .draft import Draft, Drafter
from .packing import Branch, Chunk, Packer
from .walk import Walker

Item = TypeVar("Item", bound=Sample | Passage)

Spans = Sequence[tuple[int, int]]


@dataclass
class Outcome:
    """Partial results of one plan, by the samples' indices in the split."""

    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    """Samples that the plain path decides by themselves: two logits were too close, or NaN may have come from a
    neighbour in the packed sequence."""
    unfinished: set[int] = field(default_factory=set)
    """Samples that memory is too short for: the plain path generates them."""
    failed: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    """Why the plan has no scores on text; empty where it has."""
    tied: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class ScoringRun(Generic[Item]):
    """Plans to be scored on consecutive samples of a split, the first of which has index ``start``."""

    plans: tuple[SkipPlan, ...]
    samples: Sequence[Item]
    start: int = 0
    folded: Mapping[str, Maps] = field(default_factory=dict)
    """By plan, maps that are folded into the weights while it is run, as in an export."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By plan."""

    def __post_init__(self) -> None:
        self.outcomes.update({plan.text: Outcome() for plan in self.plans})

    def sample(self, index: int) -> Item:
        """Return the sample at an index of the split."""
        return self.samples[index - self.start]

    def of(self, indices: Sequence[int]) -> list[Item]:
        """Return the samples at indices of the split."""
        return [self.sample(index) for index in indices]


class PlanScorer:
    """Score plans on packed samples."""

    def __init__(
        self, plain: PlainEvaluator, decoder: Decoder, packer: Packer, drafter: Drafter, scorer: AnswerScorer
    ) -> None:
        self._plain, self._spec, self._decoder, self._packer = plain, plain.task.spec, decoder, packer
        self._drafter, self._scorer = drafter, scorer
        self._dtype, self._ends = plain.loaded.model.dtype, end_tokens(plain.loaded.model)

    def score(
        self, walker: Walker, plans: Sequence[SkipPlan], chunks: Sequence[Chunk], scoring: ScoringRun[Sample]
    ) -> None:
        """Record in ``scoring`` what chunks, whose dense answers are known, score under plans."""
        maps = walker.maps
        trie = build_trie(plans, maps=maps is not None, drift=maps is not None and maps.drift)
        branches = [branch for chunk in chunks for branch in chunk.samples]
        sizes = [len(chunk.answer_rows) for chunk in chunks]
        spans = [
            (first + before, last + before)
            for chunk, before in zip(chunks, accumulate(sizes, initial=0), strict=False)
            for first, last in chunk.spans
        ]
        chooses = self._spec.is_choice and self._plain.targets is None
        for ends in zip(*(walker.ends(trie, chunk) for chunk in chunks), strict=True):
            (node, _), *_ = ends
            logits = self._decoder.logits(torch.cat([states for _, states in ends]))
            for chunk, own in zip(chunks, torch.split(logits, sizes), strict=True):
                assert chunk.dense is not None
                divergence = mean_divergence(chunk, chunk.dense.divergence(own))
                options = OptionLikelihoods.of(chunk, own, self._dtype) if chooses else None
                for plan in node.plans:
                    scoring.outcomes[plan].kl.update(divergence)
                    if options is not None:
                        options.grade(self._spec, scoring, scoring.outcomes[plan])
            if chooses:
                continue
            tokens = GreedyTokens.of(logits, self._dtype)
            for plan in node.plans:
                if self._plain.targets is not None:
                    self._agree(branches, spans, tokens, scoring, scoring.outcomes[plan])
                    continue
                outcome = scoring.outcomes[plan]
                still_open = self._settle(branches, spans, tokens, scoring, outcome)
                walker.keeps_keys = bool(still_open)  # plans that follow each other are alike
                continuation: Continuation | None = None
                fed: list[Keys] = []
                while still_open:
                    drafts = self._drafter.continuations(still_open)
                    continuation = Continuation.of(self._packer, chunks, drafts, continuation)
                    states, fed = walker.continued(node, continuation, fed)
                    more = GreedyTokens.of(self._decoder.logits(states), self._dtype).at(continuation.reading)
                    still_open = self._settle(continuation.branches, continuation.spans, more, scoring, outcome)
        walker.forget_keys()

    def _agree(
        self,
        branches: Sequence[Branch],
        spans: Spans,
        tokens: GreedyTokens,
        scoring: ScoringRun[Sample],
        outcome: Outcome,
    ) -> None:
        """Record how far the branches' targets are what the plan would draft; the plain path decides rare ties."""
        assert self._plain.targets is not None
        for branch, (first, last) in zip(branches, spans, strict=True):
            sample, index = scoring.sample(branch.sample), branch.sample
            target = self._plain.targets[sample.id]
            if target is None:
                continue
            best = tokens.best[first:last]
            if any(tokens.nan[first:last]):
                outcome.alone.add(index)
                continue
            own = enumerate(target, start=first)
            if any(is_open(tokens, position, token) for position, token in own):
                outcome.tied.add(index)
                if decides_ties(self._dtype):
                    outcome.alone.add(index)
                    continue
            agrees = [token == likely for token, likely in zip(target, best, strict=True)]
            outcome.scores[index] = self._plain.agreement_scores(sample, agrees)

    def _settle(
        self,
        branches: Sequence[Branch],
        spans: Spans,
        tokens: GreedyTokens,
        scoring: ScoringRun[Sample],
        outcome: Outcome,
    ) -> dict[int, tuple[int, ...]]:
        """Record the answers that are decided now; return those that are still open, as far as they are known."""
        answers: dict[int, list[GreedyAnswer]] = {}
        for branch, span in zip(branches, spans, strict=True):
            answers.setdefault(branch.sample, []).append(grade_answer(tokens, span, branch.draft, self._ends))
        still_open = {}
        for index, each in answers.items():
            answer = longest_answer(each)
            if answer.ended:
                self._drafter.remember(answer.tokens)
            scores = self._scorer.settled(scoring.sample(index), answer, self._drafter.limit, self._ends)
            if answer.not_a_number:
                outcome.alone.add(index)
            elif scores is not None:
                outcome.scores[index] = scores
            elif answer.rivals != ():
                outcome.tied.add(index)
                outcome.alone.add(index)
            else:
                still_open[index] = answer.tokens
        return still_open


def is_open(tokens: GreedyTokens, position: int, token: int) -> bool:
    """Whether rounding may decide that ``token`` is the likeliest at a position, or that it is not."""
    rivals = tokens.rivals.get(position, ())
    return token in rivals or (bool(rivals) and token == tokens.best[position])


# Options ------------------------------------------------------------------------------------------------------------


def target_drafts(targets: Targets) -> Callable[[Sample], tuple[Draft, ...]]:
    """Drafts of a sample: the dense model's own answer up to its last token, which need not be fed."""

    def draft(sample: Sample) -> tuple[Draft, ...]:
        tokens = targets[sample.id] or (0,)  # without an answer it fails, whatever is fed
        return (Draft(tokens, len(tokens)),)

    return draft


def option_drafts(loaded: LoadedModel, spec: TaskSpec) -> Callable[[Sample], tuple[Draft, ...]]:
    """Drafts of a sample: each of its options up to its last token, which need not be fed to be scored."""

    def draft(sample: Sample) -> tuple[Draft, ...]:
        try:
            return tuple(Draft(tokens, len(tokens)) for tokens in option_tokens(loaded.processor, spec, sample))
        except TaskError as error:
            raise NotExactError(str(error)) from None

    return draft


@dataclass(frozen=True)
class OptionLikelihoods:
    """Log-likelihoods of the options in a chunk under a plan, by index of the sample."""

    likelihoods: dict[int, tuple[Likelihood, ...]]

    @classmethod
    def of(cls, chunk: Chunk, logits: Tensor, dtype: torch.dtype) -> OptionLikelihoods:
        """From logits ``[answer positions, vocabulary]`` of a model in ``dtype``."""
        tokens = [token for branch in chunk.samples for token in branch.draft.tokens]
        each = token_likelihoods(logits, tokens, dtype)
        found: dict[int, tuple[Likelihood, ...]] = {}
        for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
            own = sum(each[first:last], start=Likelihood(0.0, 0.0))
            found[branch.sample] = (*found.get(branch.sample, ()), own)
        return cls(found)

    def grade(self, spec: TaskSpec, scoring: ScoringRun[Sample], outcome: Outcome) -> None:
        """Record what the samples score in ``outcome``."""
        for index, likelihoods in self.likelihoods.items():
            sample = scoring.sample(index)
            if any(math.isnan(each.total) for each in likelihoods):
                outcome.alone.add(index)
                continue
            choices = [Choice.of(name, sample.choices, likelihoods) for name in spec.metrics]
            if any(choice.is_open(sample) for choice in choices):
                outcome.tied.add(index)
                outcome.alone.add(index)
            else:
                outcome.scores[index] = tuple(choice.score(sample) for choice in choices)


def mean_divergence(chunk: Chunk, divergence: Tensor) -> dict[int, float]:
    """By index of the sample, the mean of ``divergence`` ``[answer positions]`` over those of all its options.

    A position that several options share counts once.
    """
    found: dict[int, dict[tuple[int, int], float]] = {}
    indices = list(zip(chunk.answer_rows.tolist(), chunk.answer_columns.tolist(), strict=True))
    values = divergence.tolist()
    for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
        found.setdefault(branch.sample, {}).update(zip(indices[first:last], values[first:last], strict=True))
    return {index: sum(own.values()) / len(own) for index, own in found.items()}
