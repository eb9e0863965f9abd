"""Answers that go another way than guessed and could still score: what to feed next, for which plans, in which rows.

Greedy decoding of an open answer is one more packed pass, in which what the plan has answered so far takes the place of
the guess; its last position tells the next token. Questions still share their image, and plans their layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .guesses import Guess
from .packing import Branch, Row

Open = Mapping[int, tuple[int, ...]]
"""By place in the split, the tokens that a plan has answered so far."""


@dataclass(frozen=True)
class Continuation:
    """Rows that hold open answers, and the plans (by text) whose answers they are."""

    plans: tuple[str, ...]
    rows: tuple[Row, ...]


def continuations(rows: Sequence[Row], open_answers: Mapping[str, Open]) -> Iterator[Continuation]:
    """Group plans so that what they walk together is mostly their own.

    Plans with open answers about at least half of the images share one set of rows; each other plan has its own.
    """
    wanted = {plan: _rows_of(rows, answers) for plan, answers in open_answers.items() if answers}
    many = {plan for plan, own in wanted.items() if 2 * len(own) >= len(rows)}
    if many:
        yield Continuation(tuple(sorted(many)), _with_branches(rows, [open_answers[plan] for plan in sorted(many)]))
    for plan in sorted(wanted.keys() - many):
        yield Continuation((plan,), _with_branches(wanted[plan], [open_answers[plan]]))


def _rows_of(rows: Sequence[Row], answers: Open) -> list[Row]:
    return [row for row in rows if any(branch.sample in answers for branch in row.branches)]


def _with_branches(rows: Sequence[Row], answers: Sequence[Open]) -> tuple[Row, ...]:
    """The rows with a branch for every sample and every way in which its answer goes on."""
    found = []
    for row in rows:
        branches = tuple(_branch(old, tokens) for old in row.branches for tokens in _ways(old.sample, answers))
        if branches:
            found.append(replace(row, branches=branches))
    return tuple(found)


def _ways(sample: int, answers: Sequence[Open]) -> list[tuple[int, ...]]:
    return sorted({own[sample] for own in answers if sample in own})


def _branch(old: Branch, tokens: tuple[int, ...]) -> Branch:
    return replace(old, guess=Guess(tokens, old.guess.limit))
