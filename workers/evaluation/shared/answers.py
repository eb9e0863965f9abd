"""Grade greedy answers from one teacher-forced pass.

Feed a draft of the answer behind the prompt. Where the most likely token equals the draft at every position up to and
including the end token, greedy decoding would have given exactly the draft. At the first position where it does not,
greedy decoding has given the draft up to there and then another token: what comes after that is not known yet, and
matters only if the answer could still score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from workers.layerwise.decoder import NotExactError
from workers.models.ties import tie_bound
from workers.tasks import Sample, TaskSpec
from workers.tasks.metrics import can_still_score
from workers.tasks.scoring import score_answer

from .draft import Draft

_FIRST_WORD = re.compile(r"^(\s*\w*).*", re.DOTALL)
MOST_RIVALS = 8
"""Tokens tied with the best one that are looked at; where there are more, the tie is taken to matter."""


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy answer as far as it is known: its tokens, whether it ended, and what ties could have made of it.

    ``rivals`` are other beginnings, each the draft up to a tie and the other token; None where they are too many.
    """

    tokens: tuple[int, ...]
    ended: bool
    rivals: tuple[tuple[int, ...], ...] | None = ()
    not_a_number: bool = False


@dataclass(frozen=True)
class GreedyTokens:
    """Most likely token per answer position, whether there is NaN, and which tokens are tied with it."""

    best: list[int]
    nan: list[bool]
    rivals: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, logits: Tensor, dtype: torch.dtype) -> GreedyTokens:
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

    def at(self, positions: Sequence[int]) -> GreedyTokens:
        """Select some positions, in their order."""
        rivals = {number: self.rivals[index] for number, index in enumerate(positions) if index in self.rivals}
        return GreedyTokens([self.best[index] for index in positions], [self.nan[index] for index in positions], rivals)


def grade_answer(likely: GreedyTokens, span: tuple[int, int], draft: Draft, ends: frozenset[int]) -> GreedyAnswer:
    """Follow greedy decoding along the draft as far as it goes; the span begins behind what is known of the answer."""
    first, last = span
    rivals: list[tuple[int, ...]] = []
    for step, position in enumerate(range(first, last), start=draft.known):
        if likely.nan[position]:
            return GreedyAnswer((), True, not_a_number=True)
        before, token = draft.tokens[:step], likely.best[position]
        rivals += [(*before, other) for other in likely.rivals.get(position, ())]
        known = tuple(rivals) if len(rivals) <= MOST_RIVALS else None
        if token in ends:
            return GreedyAnswer(before, True, known)
        if step >= len(draft.tokens) or token != draft.tokens[step] or step + 1 == draft.limit:
            tokens = (*before, token)
            return GreedyAnswer(tokens, len(tokens) == draft.limit, known)
    raise AssertionError("the last position gives the end token or a token beyond the draft")


def longest_answer(answers: Sequence[GreedyAnswer]) -> GreedyAnswer:
    """Pick the answer of several drafts that goes longest_answer: they agree as far as each goes."""
    return max(answers, key=lambda answer: (answer.not_a_number, answer.ended, len(answer.tokens)))


class AnswerScorer:
    """Score greedy answers under a task's metric and secondary metrics.

    With ``stable`` more tokens leave the text of those before them as it is. A tokenizer that cleans up spaces removes
    some in front of what comes later, so that only the first word is certain.
    """

    def __init__(
        self,
        spec: TaskSpec,
        decode: Callable[[Sequence[int]], str],
        *,
        stable: bool = True,
    ):
        self._spec, self._names = spec, spec.metrics
        self._decode = decode
        self._stable = stable
        self._texts: dict[tuple[int, ...], str] = {}

    def text(self, tokens: tuple[int, ...]) -> str:
        """Decode tokens as the plain path does."""
        if tokens not in self._texts:
            if len(self._texts) > 10_000:
                self._texts.clear()
            self._texts[tokens] = self._decode(tokens).strip()
        return self._texts[tokens]

    def scores(self, sample: Sample, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Return the metric and the secondary metrics of a finished answer."""
        return score_answer(self._spec, sample, self.text(tokens))

    def cannot_score(self, sample: Sample, tokens: tuple[int, ...]) -> bool:
        """Whether no answer that begins with these tokens can score under any of the metrics."""
        text = self._decode(tokens)
        if not self._stable:
            text = _FIRST_WORD.sub(r"\1", text)
        return not any(can_still_score(name, text, sample.answers) for name in self._names)

    def settled(
        self, sample: Sample, answer: GreedyAnswer, limit: int, ends: frozenset[int]
    ) -> tuple[float, ...] | None:
        """Return the scores, if they are certain: None where the answer goes on and may score, or where a tie matters.

        A tie does not matter where the answer scores nothing whichever way it went.
        """
        own = self._known(sample, answer.tokens, answer.ended)
        if own is None or answer.rivals == ():
            return own
        if answer.rivals is None or own != self.nothing:
            return None
        for rival in answer.rivals:
            ended = rival[-1] in ends
            other = self._known(sample, rival[:-1] if ended else rival, ended or len(rival) == limit)
            if other != self.nothing:
                return None
        return own

    def _known(self, sample: Sample, tokens: tuple[int, ...], ended: bool) -> tuple[float, ...] | None:
        """Scores of an answer that ended, or begins, with these tokens; None where that is open."""
        if ended:
            return self.scores(sample, tokens)
        return self.nothing if self.cannot_score(sample, tokens) else None

    @property
    def nothing(self) -> tuple[float, ...]:
        """The scores of a wrong answer."""
        return (0.0,) * len(self._names)


UNTOUCHED_LOGITS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),
    "watermarking_config": (),
    "stop_strings": (),
    "max_time": (),
}
"""Generation settings, and the values under which greedy decoding takes the most likely token until the end."""


def require_plain_decoding(model: Any) -> None:
    """Raise NotExactError where generation does more than take the most likely token."""
    config = model.generation_config
    for name, harmless in UNTOUCHED_LOGITS.items():
        value = getattr(config, name, None)
        if value is not None and value not in harmless:
            raise NotExactError(f"its generation settings change logits ({name} = {value!r})")
    if type(model).generate is not GenerationMixin.generate:
        raise NotExactError("it generates by a method of its own")
