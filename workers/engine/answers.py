"""What one teacher-forced pass says about a greedy answer.

Feed a guess of the answer behind the prompt. Where the most likely token equals the guess at every position up to and
including the end token, greedy decoding would have given exactly the guess. At the first position where it does not,
greedy decoding has given the guess up to there and then another token: what comes after that is not known yet, and
matters only if the answer could still score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.models.ties import tie_bound
from workers.tasks import Sample, TaskSpec
from workers.tasks.metrics import can_still_score

from .draft import Guess

_FIRST_WORD = re.compile(r"^(\s*\w*).*", re.DOTALL)
MOST_RIVALS = 8
"""Tokens tied with the best one that are looked at; where there are more, the tie is taken to matter."""


@dataclass(frozen=True)
class Verdict:
    """What is known of a greedy answer: its tokens so far, whether it ended, and what ties could have made of it.

    ``rivals`` are other beginnings, each the guess up to a tie and the other token; None where they are too many.
    """

    tokens: tuple[int, ...]
    ended: bool
    rivals: tuple[tuple[int, ...], ...] | None = ()
    not_a_number: bool = False


@dataclass(frozen=True)
class Choices:
    """Per answer position the most likely token, whether there is NaN, and where others are tied, with which tokens."""

    best: list[int]
    nan: list[bool]
    rivals: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, logits: Tensor, dtype: torch.dtype) -> Choices:
        """From logits ``[positions, vocabulary]``."""
        top, tokens = logits.topk(2, dim=-1)
        bound = tie_bound(top[:, 0], dtype)
        best = tokens[:, 0].tolist()
        tied = (top[:, 0] - top[:, 1] <= bound).nonzero().flatten().tolist()
        rivals = {}
        for position in tied:
            near = (logits[position] >= top[position, 0] - bound[position]).nonzero().flatten().tolist()
            rivals[position] = tuple(token for token in near if token != best[position])
        return cls(best, top[:, 0].isnan().tolist(), rivals)

    def at(self, positions: Sequence[int]) -> Choices:
        """Those of some positions, in their order."""
        rivals = {number: self.rivals[place] for number, place in enumerate(positions) if place in self.rivals}
        return Choices([self.best[place] for place in positions], [self.nan[place] for place in positions], rivals)


def judge(choices: Choices, span: tuple[int, int], guess: Guess, ends: frozenset[int]) -> Verdict:
    """Follow greedy decoding along the guess as far as it goes; the span begins behind what is known of the answer."""
    first, last = span
    rivals: list[tuple[int, ...]] = []
    for step, position in enumerate(range(first, last), start=guess.known):
        if choices.nan[position]:
            return Verdict((), True, not_a_number=True)
        before, token = guess.complete[:step], choices.best[position]
        rivals += [(*before, other) for other in choices.rivals.get(position, ())]
        known = tuple(rivals) if len(rivals) <= MOST_RIVALS else None
        if token in ends:
            return Verdict(before, True, known)
        if step >= len(guess.complete) or token != guess.complete[step] or step + 1 == guess.limit:
            tokens = (*before, token)
            return Verdict(tokens, len(tokens) == guess.limit, known)
    raise AssertionError("the last position gives the end token or a token beyond the guess")


def furthest(verdicts: Sequence[Verdict]) -> Verdict:
    """What several guesses of one answer tell together: they agree as far as each goes."""
    return max(verdicts, key=lambda verdict: (verdict.not_a_number, verdict.ended, len(verdict.tokens)))


class Scorer:
    """Scores verdicts under a task's metric and secondary metrics.

    ``stable`` tells that more tokens leave the text of those before them as it is: a tokenizer that cleans up spaces
    removes some in front of what comes later, so that only the first word is certain.
    """

    def __init__(
        self,
        spec: TaskSpec,
        decode: Callable[[Sequence[int]], str],
        metrics: Mapping[str, Callable[..., float]],
        *,
        stable: bool = True,
    ):
        self._names = (spec.metric, *spec.secondary)
        self._metrics = {name: metrics[name] for name in self._names if name in metrics}  # others score no texts
        self._decode = decode
        self._stable = stable
        self._texts: dict[tuple[int, ...], str] = {}

    def text(self, tokens: tuple[int, ...]) -> str:
        """What the tokens say, as the plain path decodes them."""
        if tokens not in self._texts:
            if len(self._texts) > 10_000:
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
        if not self._stable:
            text = _FIRST_WORD.sub(r"\1", text)
        return not any(can_still_score(name, text, sample.answers) for name in self._names)

    def settled(self, sample: Sample, verdict: Verdict, limit: int, ends: frozenset[int]) -> tuple[float, ...] | None:
        """The scores, if they are certain: None where the answer goes on and may score, or where a tie matters.

        A tie does not matter where the answer scores nothing whichever way it went.
        """
        own = self._known(sample, verdict.tokens, verdict.ended)
        if own is None or verdict.rivals == ():
            return own
        if verdict.rivals is None or own != self.nothing:
            return None
        for rival in verdict.rivals:
            ended = rival[-1] in ends
            other = self._known(sample, rival[:-1] if ended else rival, ended or len(rival) == limit)
            if other != self.nothing:
                return None
        return own

    def _known(self, sample: Sample, tokens: tuple[int, ...], ended: bool) -> tuple[float, ...] | None:
        """What an answer scores that ended, or begins, with these tokens; None where that is open."""
        if ended:
            return self.scores(sample, tokens)
        return self.nothing if self.hopeless(sample, tokens) else None

    @property
    def nothing(self) -> tuple[float, ...]:
        """All zero."""
        return (0.0,) * len(self._names)
