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


@dataclass(frozen=True)
class Forced:
    """A guess of a sample's answer: the tokens that are fed behind its prompt, and all tokens incl. those not fed.

    ``complete`` is without the end token; ``fed`` leaves out what is generated last when the length limit ends it.
    """

    complete: tuple[int, ...]
    limit: int

    @property
    def fed(self) -> tuple[int, ...]:
        """Tokens to feed."""
        return self.complete[: self.limit - 1]


@dataclass(frozen=True)
class Verdict:
    """What is known of a greedy answer: its tokens so far, whether it ended, and whether a tie was on the way."""

    tokens: tuple[int, ...]
    ended: bool
    tie: bool
    not_a_number: bool = False


@dataclass(frozen=True)
class Choices:
    """Per answer position the most likely token, how far the second is behind, and how far the forced one.

    All are lists over the positions of a chunk; ``nan`` marks positions with NaN among their logits.
    """

    best: list[int]
    tie: list[bool]
    forced_close: list[bool]
    nan: list[bool]

    @classmethod
    def of(cls, logits: Tensor, forced: Tensor, dtype: torch.dtype) -> Choices:
        """From logits ``[positions, vocabulary]`` and the forced tokens ``[positions]`` (-1 for the end token)."""
        top, tokens = logits.topk(2, dim=-1)
        bound = tie_bound(top[:, 0], dtype)
        own = logits.gather(1, forced.clamp(min=0)[:, None])[:, 0]
        close = (forced >= 0) & (top[:, 0] - own <= bound)
        return cls(
            best=tokens[:, 0].tolist(),
            tie=(top[:, 0] - top[:, 1] <= bound).tolist(),
            forced_close=close.tolist(),
            nan=top[:, 0].isnan().tolist(),
        )


def judge(choices: Choices, span: tuple[int, int], forced: Forced, ends: frozenset[int]) -> Verdict:
    """Follow greedy decoding along the guess as far as it goes."""
    first, last = span
    for step, position in enumerate(range(first, last)):
        if choices.nan[position]:
            return Verdict((), True, tie=False, not_a_number=True)
        token = choices.best[position]
        tie = any(choices.tie[first : position + 1])
        if token in ends:
            return Verdict(forced.complete[:step], True, tie)
        if step >= len(forced.complete) or token != forced.complete[step] or step + 1 == forced.limit:
            tokens = (*forced.complete[:step], token)
            return Verdict(tokens, len(tokens) == forced.limit, tie)
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
