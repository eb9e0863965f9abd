"""Solve the additive problem exactly: the least total risk among all plans that are fast enough.

An integer program over layer x action: one 0/1 variable each, at most one action a layer. It is exact only as far as
risks add up.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from optimizer.search.latency import Ratio
from optimizer.search.space import COMPENSATED, RUN, SKIP, Candidate, PlanSpace
from workers.runtime import Action, SkipPlan

Step = tuple[int, str]
"""A layer and the letter of what happens there."""

SOLVER_SECONDS = 5.0


@dataclass(frozen=True)
class Limit:
    """A sum over the steps that a plan takes, and the most it may come to."""

    amount: Mapping[Step, float]
    most: float


@dataclass(frozen=True)
class AdditiveProblem:
    """Risk and saved share of latency of every single step, and further limits."""

    space: PlanSpace
    risk: Mapping[Step, float]
    saving: Mapping[Step, float]
    limits: Sequence[Limit] = ()

    def solve(self, ratio: float = math.inf) -> Candidate | None:
        """Return the plan of least risk within the limits whose latency is at most ``ratio`` of dense, if there is one.

        Steps of infinite risk are never taken.
        """
        steps = [step for step, risk in self.risk.items() if math.isfinite(risk)]
        number = {step: index for index, step in enumerate(steps)}
        if not steps:
            return None
        rows: list[tuple[dict[int, float], float, float]] = [
            ({number[step]: self.saving.get(step, 0.0) for step in steps}, 1.0 - ratio, np.inf),
            *(({number[step]: limit.amount[step] for step in steps}, -np.inf, limit.most) for limit in self.limits),
            (dict.fromkeys(range(len(steps)), 1.0), 0.0, float(self.space.max_touched)),
        ]
        rows += [
            ({number[step]: 1.0 for step in steps if step[0] == layer}, 0.0, 1.0)
            for layer in range(self.space.num_layers)
        ]
        skips = {number[step]: 1.0 for step in steps if step[1] in (SKIP, COMPENSATED)}
        rows.append((skips, 0.0, self.space.num_layers - 1.0))
        matrix = lil_matrix((len(rows), len(steps)))
        for row, (entries, _, _) in enumerate(rows):
            for column, value in entries.items():
                matrix[row, column] = value
        with _standard_output_closed():
            solution = milp(
                np.array([self.risk[step] for step in steps]),
                constraints=LinearConstraint(
                    matrix.tocsr(), [low for _, low, _ in rows], [high for _, _, high in rows]
                ),
                integrality=np.ones(len(steps), dtype=np.int64),
                bounds=Bounds(0.0, 1.0),
                options={"time_limit": SOLVER_SECONDS, "mip_rel_gap": 0.0},
            )
        if solution.x is None:
            return None
        letters = [RUN] * self.space.num_layers
        for step, taken in zip(steps, solution.x, strict=True):
            if taken > 0.5:
                letters[step[0]] = step[1]
        genome = "".join(letters)
        return self.space.candidate(genome) if self.space.allows(genome) else None

    def solutions(self, ratios: Sequence[float]) -> tuple[Candidate, ...]:
        """Return the solutions for several latency budgets, equal ones once, in the order of the budgets."""
        found = (self.solve(ratio) for ratio in ratios)
        return tuple(dict.fromkeys(candidate for candidate in found if candidate is not None))


_closing = threading.Lock()
"""Two threads at once would each keep the other's closed output."""


@contextmanager
def _standard_output_closed() -> Iterator[None]:
    """Drop what HiGHS prints on standard output whatever its options say, now and then: results in JSON go there."""
    library = ctypes.CDLL(None)
    with _closing, ExitStack() as restoring:
        try:
            kept = os.dup(1)
        except OSError:  # there is none
            yield
            return
        restoring.callback(os.close, kept)
        restoring.callback(os.dup2, kept, 1)
        restoring.callback(library.fflush, None)
        library.fflush(None)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
        yield


def steps_of(space: PlanSpace) -> list[Step]:
    """List every single step that a space allows."""
    return [(layer, letter) for layer, own in enumerate(space.genome_letters) for letter in own.replace(RUN, "")]


def action_of(step: Step) -> Action:
    """Return the action of a step; a compensated skip is a skip."""
    return Action.SKIP if step[1] == COMPENSATED else Action.of(step[1])


def savings(space: PlanSpace, ratio: Ratio) -> dict[Step, float]:
    """Compute by how much each step alone shortens a request, as a share of the dense request."""
    dense = SkipPlan.dense(space.num_layers)
    return {step: ratio(dense) - ratio(dense.with_action(step[0], action_of(step))) for step in steps_of(space)}


def budgets(saving: Mapping[Step, float], count: int) -> tuple[float, ...]:
    """``count`` latency budgets from a tenth to nine tenths of what could be saved, the middle ones first."""
    best: dict[int, float] = {}
    for (layer, _), saved in saving.items():
        best[layer] = max(best.get(layer, 0.0), saved)
    total = sum(best.values())
    shares = np.linspace(0.1, 0.9, count)
    return tuple(1.0 - float(shares[index]) * total for index in spread_order(count))


def spread_order(count: int) -> list[int]:
    """``0 .. count - 1``, the middle first, then the quarters, and so on."""
    order: list[int] = []
    stretches = [(0, count)]
    while stretches:
        low, high = stretches.pop(0)
        if low < high:
            middle = (low + high) // 2
            order.append(middle)
            stretches += [(low, middle), (middle + 1, high)]
    return order
