"""Answers that go another way than guessed and could still score: what to feed next, for which plans, in which rows.

Greedy decoding of an open answer is one more packed pass, in which what the plan has answered so far takes the place of
the guess, with how other answers went on from there behind it. Questions still share images, and plans share layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .guesses import Guess
from .packing import Row

Open = Mapping[int, tuple[int, ...]]
"""By place in the split, the tokens that a plan has answered so far."""


@dataclass(frozen=True)
class Continuation:
    """Rows that hold open answers, and the plans (by text) whose answers they are."""

    plans: tuple[str, ...]
    rows: tuple[Row, ...]


def continuations(
    rows: Sequence[Row], open_answers: Mapping[str, Open], going_on: Callable[[tuple[int, ...]], Guess]
) -> Iterator[Continuation]:
    """Group plans so that what they walk together is mostly their own.

    Plans with open answers about at least half of the images share one set of rows; each other plan has its own.
    ``going_on`` guesses how an answer goes on behind what is known of it.
    """
    wanted = {plan: _rows_of(rows, answers) for plan, answers in open_answers.items() if answers}
    many = {plan for plan, own in wanted.items() if 2 * len(own) >= len(rows)}
    if many:
        yield Continuation(
            tuple(sorted(many)), _with_branches(rows, [open_answers[plan] for plan in sorted(many)], going_on)
        )
    for plan in sorted(wanted.keys() - many):
        yield Continuation((plan,), _with_branches(wanted[plan], [open_answers[plan]], going_on))


def _rows_of(rows: Sequence[Row], answers: Open) -> list[Row]:
    return [row for row in rows if any(branch.sample in answers for branch in row.branches)]


def _with_branches(
    rows: Sequence[Row], answers: Sequence[Open], going_on: Callable[[tuple[int, ...]], Guess]
) -> tuple[Row, ...]:
    """The rows with a branch for every sample and every way in which its answer goes on."""
    found = []
    for row in rows:
        branches = tuple(
            replace(old, guess=going_on(known)) for old in row.branches for known in _ways(old.sample, answers)
        )
        if branches:
            found.append(replace(row, branches=branches))
    return tuple(found)


def _ways(sample: int, answers: Sequence[Open]) -> list[tuple[int, ...]]:
    return sorted({own[sample] for own in answers if sample in own})
