"""What one teacher-forced pass says about a greedy answer.

Feed a guess of the answer behind the prompt. Where the most likely token equals the guess at every position up to and
including the end token, greedy decoding would have given exactly the guess. At the first position where it does not,
greedy decoding has given the guess up to there and then another token: what comes after that is not known yet, and
matters only if the answer could still score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.metrics import can_still_score
from workers.tasks import Sample, TaskSpec
from workers.ties import tie_bound

from .guesses import Guess


@dataclass(frozen=True)
class Verdict:
    """What is known of a greedy answer: its tokens so far, whether it ended, and whether a tie was on the way."""

    tokens: tuple[int, ...]
    ended: bool
    tie: bool
    not_a_number: bool = False


@dataclass(frozen=True)
class Choices:
    """Per answer position the most likely token, whether another one is tied with it, and whether there is NaN."""

    best: list[int]
    tie: list[bool]
    nan: list[bool]

    @classmethod
    def of(cls, logits: Tensor, dtype: torch.dtype) -> Choices:
        """From logits ``[positions, vocabulary]``."""
        top, tokens = logits.topk(2, dim=-1)
        tied = top[:, 0] - top[:, 1] <= tie_bound(top[:, 0], dtype)
        return cls(best=tokens[:, 0].tolist(), tie=tied.tolist(), nan=top[:, 0].isnan().tolist())


def judge(choices: Choices, span: tuple[int, int], guess: Guess, ends: frozenset[int]) -> Verdict:
    """Follow greedy decoding along the guess as far as it goes."""
    first, last = span
    for step, position in enumerate(range(first, last)):
        if choices.nan[position]:
            return Verdict((), True, tie=False, not_a_number=True)
        token = choices.best[position]
        tie = any(choices.tie[first : position + 1])
        if token in ends:
            return Verdict(guess.complete[:step], True, tie)
        if step >= len(guess.complete) or token != guess.complete[step] or step + 1 == guess.limit:
            tokens = (*guess.complete[:step], token)
            return Verdict(tokens, len(tokens) == guess.limit, tie)
    raise AssertionError("the last position gives the end token or a token beyond the guess")


class Scorer:
    """Scores verdicts under a task's metric and secondary metrics."""

    def __init__(
        self, spec: TaskSpec, decode: Callable[[Sequence[int]], str], metrics: dict[str, Callable[..., float]]
    ):
        self._names = (spec.metric, *spec.secondary)
        self._metrics = {name: metrics[name] for name in self._names}
        self._decode = decode
        self._texts: dict[tuple[int, ...], str] = {}

    def text(self, tokens: tuple[int, ...]) -> str:
        """What the tokens say, as the plain path decodes them."""
        if tokens not in self._texts:
            if len(self._texts) > 100_000:
                self._texts.clear()
            self._texts[tokens] = self._decode(tokens).strip()
        return self._texts[tokens]

    def scores(self, sample: Sample, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """The metric and the secondary metrics of a finished answer."""
        return self.scores_of_text(sample, self.text(tokens))

    def scores_of_text(self, sample: Sample, text: str) -> tuple[float, ...]:
        """The metric and the secondary metrics of an answer's text."""
        return tuple(self._metrics[name](text, sample.answers) for name in self._names)

    def hopeless(self, sample: Sample, tokens: tuple[int, ...]) -> bool:
        """Whether no answer that begins with these tokens can score under any of the metrics."""
        text = self._decode(tokens)
        return not any(can_still_score(name, text, sample.answers) for name in self._names)

    @property
    def nothing(self) -> tuple[float, ...]:
        """All zero."""
        return (0.0,) * len(self._names)
