"""SLEB: remove the layer whose removal hurts least, measured anew after every removal.

The paper measures the loss on calibration data; here it is the KL to dense (the loss of accuracy where KL is not
measured) on the first rung. The winner of a round is then evaluated on all samples. Source: Song et al., arXiv
2402.09025.
"""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.search.problem import Answer, Ask, Problem, better_first
from optimizer.search.space import SKIP, Candidate
from optimizer.search.strategies.published import applied, need_plain_skips
from optimizer.search.trial import Trial


class Sleb:
    """Remove layers greedily, down to the last one that may go."""

    expected_gain: float | None = None

    def __init__(self, problem: Problem) -> None:
        need_plain_skips(problem, "sleb")
        self._space, self._first_rung = problem.space, problem.rungs[0]
        self._removed: tuple[int, ...] = ()
        self._round: list[Trial] = []
        self._queue = self._candidates()
        self.done = "sleb has removed every layer that may go"

    def start(self, dense: Trial) -> None: ...

    def ask(self, count: int) -> Sequence[Ask]:
        """Return the rest of the round on the first rung, or the round's winner on all samples."""
        if not self._queue and self._round:
            best = min(self._round, key=better_first)
            self._removed = tuple(layer for layer, letter in enumerate(best.plan) if letter == SKIP)
            self._round, self._queue = [], self._candidates()
            return [Ask(best.candidate)]
        batch, self._queue = self._queue[:count], self._queue[count:]
        return [Ask(candidate, self._first_rung) for candidate in batch]

    def tell(self, answers: Sequence[Answer]) -> None:
        self._round += [trial for candidate, trial in answers if trial is not None and self._is_next(candidate)]

    def _is_next(self, candidate: Candidate) -> bool:
        return candidate.plan.text.count(SKIP) == len(self._removed) + 1

    def _candidates(self) -> list[Candidate]:
        free = [layer for layer, own in enumerate(self._space.letters) if SKIP in own and layer not in self._removed]
        plans = [applied(self._space, (*self._removed, layer), SKIP) for layer in free]
        return [plan for plan in plans if plan in self._space]
