"""Reckon the rounds of greedy speculation from where a drafter agrees with the dense model's own answer.

Feed the dense model's greedy answer behind the prompt, and look at which positions the drafter's most likely token is
the answer's. Greedy speculation (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) keeps a drafted
token exactly there and goes on behind the dense model's, so its rounds follow from the agreement alone. That
holds for a drafter with a cache of its own; one that drafts on the dense model's cache (``workers.runtime``) is
accepted a little more or less often, and of it these are the expected rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LONGEST_SCORED_DRAFT = 8
"""Most tokens drafted in a round that a search reckons with."""
DRAFT_LENGTHS = range(1, LONGEST_SCORED_DRAFT + 1)

STATISTICS = ("tokens", *(f"{name}_{length}" for length in DRAFT_LENGTHS for name in ("rounds", "drafted")))
"""Names of what :func:`scores_of_agreement` returns behind the acceptance; their means over samples are stored."""


@dataclass(frozen=True)
class Rounds:
    """Cost of one answer: passes of the dense model over a draft, and tokens drafted for them."""

    rounds: int
    drafted: int


def count_rounds(agrees: Sequence[bool], draft_length: int, limit: int) -> Rounds:
    """Count what greedy speculation takes to an answer whose tokens behind the first one are ``agrees`` long.

    The first token comes with the prompt. A round drafts up to ``draft_length`` tokens, fewer where the answer's
    ``limit`` is near, since the dense model adds one, and none behind an end token. It keeps those before the first
    that does not agree, and the dense model's own token there.
    """
    rounds = drafted = done = 0
    while done < len(agrees):
        room = min(draft_length, limit - 2 - done)
        kept = 0
        while kept < room and done + kept < len(agrees) and agrees[done + kept]:
            kept += 1
        ended = done + kept == len(agrees)  # by the end token: the limit leaves room for one more
        rounds += 1
        drafted += kept if ended else room
        done += kept + 1
    return Rounds(rounds, drafted)


def scores_of_agreement(agrees: Sequence[bool], limit: int) -> tuple[float, ...]:
    """Return the share of the answer's positions that agree, then the :data:`STATISTICS` of the answer.

    ``agrees`` holds all positions, the end token's included, of an answer of at most ``limit`` tokens; ``tokens`` are
    those behind the first, which the prompt's own pass gives.
    """
    behind = agrees[1:]
    counted = [count_rounds(behind, length, limit) for length in DRAFT_LENGTHS]
    statistics = [float(number) for each in counted for number in (each.rounds, each.drafted)]
    return (sum(agrees) / len(agrees), float(len(behind)), *statistics)


def rounds_by_length(means: Mapping[str, float]) -> tuple[tuple[float, float], ...]:
    """Return, for each draft length from 1, rounds and drafted tokens for each token of an answer behind the first.

    ``means`` are the :data:`STATISTICS` over samples: a ratio of means is the ratio of the sums. Empty where answers
    have one token alone.
    """
    if not means["tokens"]:
        return ()
    return tuple(
        (means[f"rounds_{length}"] / means["tokens"], means[f"drafted_{length}"] / means["tokens"])
        for length in DRAFT_LENGTHS
    )
