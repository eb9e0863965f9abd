"""Draft the tokens of an answer before the model gives it: which text, and how the model would spell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.tasks import Sample

MOST_BEGINNINGS = 1_000
"""Beginnings of answers whose continuations are remembered."""

RARE = 0.25
"""The share of answers above which a way to go on is fed."""

FREE_TOKENS = 16
"""Tokens that a pass takes in little more time than one: reading the weights is what it waits for."""

Spelling = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Draft:
    """The tokens that an answer is expected to have, without the end token, at most ``limit`` of them.

    ``fed`` are those that are fed behind the prompt: a last one that the length limit ends decides nothing any more.
    """

    tokens: tuple[int, ...]
    limit: int
    known: int = 0
    """Tokens at the beginning that were answered already; those behind them are asked for."""

    @property
    def fed(self) -> tuple[int, ...]:
        """Tokens to feed behind the prompt."""
        return self.tokens[: self.limit - 1]


class Drafter:
    """Draft the tokens of the accepted answer given most often.

    A wrong draft costs time, never correctness. The same text has several spellings in tokens (with a space in front,
    for one), of which a model uses one: it is learned from answers that the model gave.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.limit = limit
        self._spellings: tuple[Spelling, ...] = tuple(_spelling(tokenizer, lead) for lead in ("", " ", "\n"))
        self._votes: Counter[int] = Counter()
        self._given: dict[str, tuple[int, ...]] = {}
        self._endings: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}

    def learn(self, text: str, tokens: Sequence[int]) -> None:
        """Record that the model spelled ``text`` so (``tokens`` without the end token)."""
        self._given.setdefault(text, tuple(tokens))
        for number, spelling in enumerate(self._spellings):
            self._votes[number] += spelling(text) == tuple(tokens)

    def forced(self, sample: Sample) -> Draft:
        """Return the draft for a sample."""
        (text, _), *_ = Counter(answer.strip() for answer in sample.answers if answer.strip()).most_common(1)
        tokens = self._given.get(text)
        if tokens is None:
            best = max(range(len(self._spellings)), key=lambda number: (self._votes[number], -number))
            tokens = self._spellings[best](text)
        return Draft(tokens[: self.limit], self.limit)

    def remember(self, tokens: tuple[int, ...]) -> None:
        """Remember an answer that some plan gave to its end: plans that go wrong often go wrong alike."""
        if len(self._endings) > MOST_BEGINNINGS:
            self._endings.clear()
        for known in range(1, len(tokens)):
            self._endings.setdefault(tokens[:known], Counter())[tokens] += 1

    def continuations(self, answers: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[Draft, ...]]:
        """Drafts for answers that begin so: as most answers with that beginning went on.

        A right draft saves a pass and a wrong one costs its tokens: those most likely right are taken, as many as make
        a pass little longer.
        """
        room = FREE_TOKENS - len(answers)
        likely: list[tuple[float, int, tuple[int, ...]]] = []
        for sample, known in answers.items() if room > 0 else ():
            endings = self._endings.get(known, Counter())
            likely += [(times / endings.total(), sample, ending) for ending, times in endings.items()]
        chosen: dict[int, tuple[Draft, ...]] = dict.fromkeys(answers, ())
        for share, sample, ending in sorted(likely, key=lambda each: -each[0]):
            draft = Draft(ending, self.limit, known=len(answers[sample]))
            room -= len(draft.fed) - draft.known
            if room < 0 or share <= RARE:
                break
            chosen[sample] += (draft,)
        return {
            sample: drafts or (Draft(answers[sample], self.limit, known=len(answers[sample])),)
            for sample, drafts in chosen.items()
        }


def _spelling(tokenizer: Any, lead: str) -> Spelling:
    def spell(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(lead + text, add_special_tokens=False)["input_ids"])

    return spell
