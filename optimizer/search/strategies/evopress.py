"""EvoPress: swap mutations that keep the number of removed layers, survivors on more samples.

Source: Sieberling et al., arXiv 2410.14649.

The paper searches one compression level at a time: offspring of the one parent exchange removed and kept layers, many
are judged by their KL to dense on few samples and the survivors on more; the best becomes the parent (which takes
part itself). Here every number of removed layers is a level with its own parent, and generations go round the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optimizer.search.problem import Answer, Ask, Problem, better_first
from optimizer.search.seeds.additive import spread_order
from optimizer.search.space import SKIP, Candidate
from optimizer.search.strategies.published import applied, need_plain_skips
from optimizer.search.trial import Trial

OFFSPRING = 16
SURVIVORS = 3
MOST_SWAPS = 3
LEVELS = 8
ATTEMPTS = 20
"""Mutations drawn for each offspring wanted, until enough new ones were found."""


@dataclass
class Level:
    """One number of removed layers and the best set found for it."""

    size: int
    parent: tuple[int, ...] | None = None


class EvoPress:
    """Evolve every level in turn, one generation at a time."""

    expected_gain: float | None = None
    done = "no level has a mutation left to try"

    def __init__(self, problem: Problem) -> None:
        need_plain_skips(problem, "evopress")
        self._space, self._rungs = problem.space, problem.rungs
        self._random = np.random.default_rng([problem.seed, 3])
        self._free = [layer for layer, own in enumerate(problem.space.letters) if SKIP in own]
        most = min(len(self._free), problem.space.max_touched, problem.space.num_layers - 1)
        sizes = sorted({max(1, round(most * (step + 1) / (LEVELS + 1))) for step in range(LEVELS)})
        self._levels = [Level(sizes[index]) for index in spread_order(len(sizes))]
        self._turn = 0
        self._survivors: list[Candidate] = []
        """Of the generation under way; empty while its offspring are evaluated."""
        self._seen: set[Candidate] = set()

    def start(self, dense: Trial) -> None: ...

    def ask(self, count: int) -> Sequence[Ask]:
        """Return a generation's offspring on the first rung, or its survivors and the parent on all samples."""
        if self._survivors:
            return [Ask(candidate, self._rungs[-1]) for candidate in self._survivors]
        for _ in range(len(self._levels)):
            level = self._levels[self._turn % len(self._levels)]
            offspring = self._offspring(level)[: max(1, count)] if count < OFFSPRING else self._offspring(level)
            if offspring:
                return [Ask(candidate, self._rungs[0]) for candidate in offspring]
            self._turn += 1
        return []

    def tell(self, answers: Sequence[Answer]) -> None:
        """Select the survivors, or the next parent."""
        level = self._levels[self._turn % len(self._levels)]
        ranked = sorted((trial for _, trial in answers if trial is not None), key=better_first)
        if ranked and not self._survivors:
            best = [trial.candidate for trial in ranked[:SURVIVORS]]
            parent = [] if level.parent is None else [applied(self._space, level.parent, SKIP)]
            self._survivors = list(dict.fromkeys([*best, *parent]))
            return
        if ranked:
            level.parent = tuple(layer for layer, letter in enumerate(ranked[0].plan) if letter == SKIP)
        self._survivors = []
        self._turn += 1

    def _offspring(self, level: Level) -> list[Candidate]:
        found: dict[Candidate, None] = {}
        for _ in range(OFFSPRING * ATTEMPTS):
            if len(found) == OFFSPRING:
                break
            candidate = applied(self._space, self._mutated(level), SKIP)
            if candidate in self._space and candidate not in self._seen:
                found.setdefault(candidate)
        self._seen.update(found)
        return list(found)

    def _mutated(self, level: Level) -> tuple[int, ...]:
        """Return a random set for a level without parent, else the parent with a few swaps (few are likelier)."""
        if level.parent is None:
            return tuple(int(layer) for layer in self._random.choice(self._free, level.size, replace=False))
        removed, kept = list(level.parent), [layer for layer in self._free if layer not in level.parent]
        swaps = min(int(self._random.integers(1, MOST_SWAPS + 1)), int(self._random.integers(1, MOST_SWAPS + 1)))
        for _ in range(min(swaps, len(removed), len(kept))):
            out, into = int(self._random.integers(len(removed))), int(self._random.integers(len(kept)))
            removed[out], kept[into] = kept[into], removed[out]
        return tuple(sorted(removed))
