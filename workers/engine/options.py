"""Score a question's options in packed rows.

Each option is a branch behind its question; all options of one question are in the same row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import TaskError
from workers.layerwise.decoder import NotExactError
from workers.models.loading import LoadedModel
from workers.models.multiple_choice import Choice, Likelihood, option_tokens, token_likelihoods
from workers.tasks import Sample, TaskSpec

from .draft import Guess
from .packing import Chunk
from .requests import Asked, Outcome


def option_guesses(loaded: LoadedModel, spec: TaskSpec) -> Callable[[Sample], tuple[Guess, ...]]:
    """What is fed for a sample: each of its options up to its last token, which need not be fed to be scored."""

    def guesses(sample: Sample) -> tuple[Guess, ...]:
        try:
            return tuple(Guess(tokens, len(tokens)) for tokens in option_tokens(loaded.processor, spec, sample))
        except TaskError as error:
            raise NotExactError(str(error)) from None

    return guesses


@dataclass(frozen=True)
class Worth:
    """What a plan makes of the options in a chunk: by place of the sample, each option's log-likelihood."""

    likelihoods: dict[int, tuple[Likelihood, ...]]

    @classmethod
    def of(cls, chunk: Chunk, logits: Tensor, dtype: torch.dtype) -> Worth:
        """From logits ``[answer positions, vocabulary]`` of a model in ``dtype``."""
        tokens = [token for branch in chunk.samples for token in branch.guess.complete]
        each = token_likelihoods(logits, tokens, dtype)
        found: dict[int, tuple[Likelihood, ...]] = {}
        for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
            own = sum(each[first:last], start=Likelihood(0.0, 0.0))
            found[branch.sample] = (*found.get(branch.sample, ()), own)
        return cls(found)

    def judge(self, spec: TaskSpec, asked: Asked, outcome: Outcome) -> None:
        """Take note of what the samples score."""
        for place, likelihoods in self.likelihoods.items():
            sample = asked.sample(place)
            if any(math.isnan(each.total) for each in likelihoods):
                outcome.alone.add(place)
                continue
            choices = [Choice.of(name, sample.choices, likelihoods) for name in spec.metrics]
            if any(choice.is_open(sample) for choice in choices):
                outcome.tied.add(place)
                outcome.alone.add(place)
            else:
                outcome.scores[place] = tuple(choice.score(sample) for choice in choices)


def mean_divergence(chunk: Chunk, divergence: Tensor) -> dict[int, float]:
    """By place of the sample, the mean of ``divergence`` ``[answer positions]`` over those of all its options.

    A position that several options share counts once.
    """
    found: dict[int, dict[tuple[int, int], float]] = {}
    places = list(zip(chunk.answer_rows.tolist(), chunk.answer_columns.tolist(), strict=True))
    values = divergence.tolist()
    for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
        found.setdefault(branch.sample, {}).update(zip(places[first:last], values[first:last], strict=True))
    return {place: sum(own.values()) / len(own) for place, own in found.items()}
