"""Greedy methods: of all next steps the one that hurts least, measured anew after every step.

The papers measure the loss or the change of the output on calibration data; here it is the KL to dense (the loss of
accuracy where KL is not measured) on the first rung. The winner of a round is then evaluated on all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimizer.search.problem import Answer, Ask, Problem, better_first
from optimizer.search.space import RUN, SKIP, Candidate
from optimizer.search.strategies.published import (
    need_plain_skips,
    need_sublayers,
    need_vision_sublayers,
)
from optimizer.search.trial import Trial
from workers.runtime import Action

ATTENTION_GONE, MLP_GONE = Action.SKIP_ATTENTION.letter, Action.SKIP_MLP.letter
ATTENTION_FROZEN, MLP_FROZEN = Action.FREEZE_ATTENTION.letter, Action.FREEZE_MLP.letter
FROZEN, BYPASSED = Action.FREEZE.letter, Action.BYPASS.letter
LAYERS = {RUN: SKIP}
SUBLAYERS = {RUN: ATTENTION_GONE + MLP_GONE, ATTENTION_GONE: SKIP, MLP_GONE: SKIP}
VISION_SUBLAYERS = {
    RUN: ATTENTION_FROZEN + MLP_FROZEN,
    ATTENTION_FROZEN: FROZEN,
    MLP_FROZEN: FROZEN,
    FROZEN: BYPASSED,
}


class Greedy:
    """Change one layer at a time, down to where nothing more may go.

    ``steps`` has, by a layer's letter, the letters that it may have next.
    """

    expected_gain: float | None = None

    def __init__(self, problem: Problem, name: str, steps: Mapping[str, str]) -> None:
        self._space, self._first_rung, self._steps = problem.space, problem.rungs[0], steps
        self._round: list[Trial] = []
        self._queue = self._candidates(RUN * problem.space.num_layers)
        self._of_round = frozenset(self._queue)
        self.done = f"{name} has removed everything that may go"

    def start(self, dense: Trial) -> None: ...

    def ask(self, count: int) -> Sequence[Ask]:
        """Return the rest of the round on the first rung, or the round's winner on all samples."""
        if not self._queue and self._round:
            best = min(self._round, key=better_first)
            self._round, self._queue = [], self._candidates(best.plan)
            self._of_round = frozenset(self._queue)
            return [Ask(best.candidate)]
        batch, self._queue = self._queue[:count], self._queue[count:]
        return [Ask(candidate, self._first_rung) for candidate in batch]

    def tell(self, answers: Sequence[Answer]) -> None:
        self._round += [trial for candidate, trial in answers if trial is not None and candidate in self._of_round]

    def _candidates(self, plan: str) -> list[Candidate]:
        """Return the plans one step on that the space has."""
        plans = [
            self._space.candidate(plan[:layer] + letter + plan[layer + 1 :])
            for layer, own in enumerate(plan)
            for letter in self._steps.get(own, "")
        ]
        return [each for each in plans if each in self._space]


def sleb(problem: Problem) -> Greedy:
    """Remove the layer whose removal hurts least, again and again.

    Source: Song et al., "SLEB", arXiv 2402.09025.
    """
    need_plain_skips(problem, "sleb")
    return Greedy(problem, "sleb", LAYERS)


def finercut(problem: Problem) -> Greedy:
    """Remove the attention or the MLP whose removal changes the output least, again and again.

    Which of both may go follows from the job's actions. Sources: Zhang et al., "FinerCut", arXiv 2405.18218; Zhong et
    al., "BlockPruner", arXiv 2406.10594, do the same by perplexity.
    """
    need_sublayers(problem, "finercut")
    return Greedy(problem, "finercut", SUBLAYERS)


def gsop(problem: Problem) -> Greedy:
    """Remove the operation on vision tokens whose removal hurts least, again and again.

    Operations are what attention updates in vision tokens, what the MLP does, and that text attends to vision tokens,
    which goes last at a layer. Which of them may go follows from the job's actions. Source: Liu et al., "Beyond Token
    Pruning: Operation Pruning in Vision-Language Models" (GSOP), arXiv 2507.02909v1, with all vision tokens as one
    group, and without its shortcuts: every remaining operation is measured in every round.
    """
    need_vision_sublayers(problem, "gsop")
    return Greedy(problem, "gsop", VISION_SUBLAYERS)
