"""SWIFT: random sets of layers, every so often the one of a Gaussian process, kept where more drafts would be right.

Source: Xia et al., arXiv 2410.06916.

The paper skips sublayers while it serves, at one share of them; a set is judged by how many tokens of the text so far
it gets right, teacher-forced. Here whole layers are skipped, every share is a level, and a set is judged on the first
rung: in a lossless job by just that agreement, otherwise by the KL to dense. A set that is better than its level's
others is evaluated on all samples. The paper ends when a set is right in 95 %; here the budget ends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from optimizer.search.problem import Answer, Ask, Problem, better_first
from optimizer.search.seeds.additive import spread_order
from optimizer.search.space import SKIP, Candidate
from optimizer.search.strategies.published import applied, need_plain_skips
from optimizer.search.trial import Trial

Floats = NDArray[np.float64]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Of the layers between the first and the last, which are never skipped; the paper takes 0.45 or 0.5."""
BAYES_INTERVAL = 25
"""Every so many sets, one is the process's."""
KAPPA = 2.5
"""Standard deviations of its upper confidence bound."""
POOL = 512
"""Random sets among which the process chooses; the authors' code searches the cube around them."""
LENGTH_SCALES = (0.5, 1.0, 2.0, 4.0)
NOISE = 1e-6
ATTEMPTS = 20
"""Draws for a set that is new, before a level is taken to have none left."""


@dataclass
class Level:
    """One number of skipped layers and what was found of it."""

    size: int
    sets: list[tuple[int, ...]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    proposals: int = 0


class Swift:
    """Go round the levels, one set each."""

    expected_gain: float | None = None
    done = "swift found no further set of layers"

    def __init__(self, problem: Problem) -> None:
        need_plain_skips(problem, "swift")
        self._problem, space = problem, problem.space
        self._random = np.random.default_rng([problem.seed, 4])
        self._free = [layer for layer in range(1, space.num_layers - 1) if SKIP in space.letters[layer]]
        sizes = sorted({max(1, round(share * len(self._free))) for share in SHARES})
        sizes = [size for size in sizes if size <= min(len(self._free), space.max_touched)]
        self._levels = [Level(sizes[index]) for index in spread_order(len(sizes))]
        self._turn = 0
        self._better: list[Candidate] = []
        """Sets that are to be evaluated on all samples next."""
        self._seen: set[Candidate] = set()

    def start(self, dense: Trial) -> None: ...

    def ask(self, count: int) -> Sequence[Ask]:
        """Return sets that were better than their level's others, on all samples, or new ones on the first rung."""
        if self._better:
            return [Ask(candidate) for candidate in self._better]
        asked: list[Ask] = []
        without = 0
        while len(asked) < count and without < len(self._levels):
            level = self._levels[self._turn % len(self._levels)]
            self._turn += 1
            found = self._proposal(level)
            without = 0 if found else without + 1
            if found:
                self._seen.add(found)
                asked.append(Ask(found, self._problem.rungs[0]))
        return asked

    def tell(self, answers: Sequence[Answer]) -> None:
        """Take in values of new sets, and see which are better than all of their level before."""
        if self._better:
            self._better = []
            return
        for candidate, trial in answers:
            if trial is None:
                continue
            skipped = tuple(layer for layer, letter in enumerate(candidate.plan.text) if letter == SKIP)
            level = next(level for level in self._levels if level.size == len(skipped))
            value = -better_first(trial)[0]
            if value > max(level.values, default=-math.inf):
                self._better.append(candidate)
            level.sets.append(skipped)
            level.values.append(value)

    def _proposal(self, level: Level) -> Candidate | None:
        level.proposals += 1
        if level.proposals == 1:  # as evenly spread as the numbers allow
            places = np.linspace(0, len(self._free) - 1, level.size + 2)[1:-1]
            even = self._new([self._free[round(place)] for place in places], level)
            if even is not None:
                return even
        if level.proposals % BAYES_INTERVAL == 0 and len(set(level.values)) > 1:
            return self._most_promising(level)
        for _ in range(ATTEMPTS):
            if found := self._new(self._drawn(level), level):
                return found
        return None

    def _drawn(self, level: Level) -> list[int]:
        return [int(layer) for layer in self._random.choice(self._free, level.size, replace=False)]

    def _new(self, layers: Sequence[int], level: Level) -> Candidate | None:
        candidate = applied(self._problem.space, layers, SKIP)
        known = candidate in self._seen or len(set(layers)) != level.size
        return None if known or candidate not in self._problem.feasible else candidate

    def _most_promising(self, level: Level) -> Candidate | None:
        pool = [found for _ in range(POOL) if (found := self._new(self._drawn(level), level))]
        if not pool:
            return None
        rows = np.array([[letter == SKIP for letter in each.plan.text] for each in pool], dtype=float)
        seen = np.array([[layer in each for layer in range(rows.shape[1])] for each in level.sets], dtype=float)
        return pool[int(np.argmax(upper_bound(seen, np.array(level.values), rows)))]


def upper_bound(seen: Floats, values: Floats, rows: Floats) -> Floats:
    """Upper confidence bound at ``rows`` ``[n, layers]`` of a process through ``values`` at ``seen`` ``[m, layers]``.

    The kernel is Matern's of order 5/2, its length scale the likeliest of a few, as the authors' library has it.
    """
    centred = (values - values.mean()) / values.std()

    def evidence(scale: float) -> float:
        factor = cho_factor(_matern(seen, seen, scale) + NOISE * np.eye(len(seen)))
        return float(-0.5 * centred @ cho_solve(factor, centred) - np.log(np.diag(factor[0])).sum())

    scale = max(LENGTH_SCALES, key=evidence)
    factor = cho_factor(_matern(seen, seen, scale) + NOISE * np.eye(len(seen)))
    across = _matern(rows, seen, scale)
    mean = across @ cho_solve(factor, centred)
    variance = 1.0 - np.einsum("ij,ji->i", across, cho_solve(factor, across.T))
    bound: Floats = mean + KAPPA * np.sqrt(np.clip(variance, 0.0, None))
    return bound


def _matern(first: Floats, second: Floats, scale: float) -> Floats:
    squares = np.clip(((first[:, None] - second[None]) ** 2).sum(-1), 0.0, None)
    distance = np.sqrt(5.0 * squares) / scale
    kernel: Floats = (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)
    return kernel
