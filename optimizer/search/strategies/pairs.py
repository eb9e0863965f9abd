"""Pair-aware seeds: a budget of measured pairs corrects the additive problem before the search proper begins.

Risks do not add up: two neighbours may cover for each other. Single steps that the additive solutions use, and the
pairs that they use together most often, are measured on the first rung; what a pair does beyond its two steps enters
the integer program, whose new solutions are the first seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from optimizer.criteria import Risk
from optimizer.search.problem import Answer, Ask, Problem
from optimizer.search.seeds.additive import AdditiveProblem, Step, budgets, savings
from optimizer.search.seeds.runs import unexplained_shares
from optimizer.search.seeds.theory import LADDER, step_risks, with_compensated
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.strategies.bisection import Scouting
from optimizer.search.strategies.study import StudyStrategy
from optimizer.search.surrogate.encoding import RUN
from optimizer.search.trial import Tried

Pair = tuple[Step, Step]


@dataclass(frozen=True)
class Family:
    """One compensation's part of the space: its additive problem, and the pairs that are measured for it."""

    additive: AdditiveProblem
    pairs: tuple[Pair, ...]


class PairAware:
    """Measures pairs first, then hands over to the strategy inside, with corrected seeds."""

    def __init__(self, problem: Problem, inner: StudyStrategy | Scouting, pairs: int) -> None:
        self._problem, self._inner = problem, inner
        self._ratios = budgets(savings(problem.space, problem.ratio), LADDER)
        risk = with_compensated(problem.risk, unexplained_shares(problem.table))
        spaces = problem.space.parts
        self._families = [self._family(space, risk, pairs // len(spaces)) for space in spaces]
        self._harm: dict[Candidate, float] = {}
        self._queue = list(dict.fromkeys(each for family in self._families for each in self._to_measure(family)))
        self._corrected = False

    @property
    def done(self) -> str:
        """Why there is nothing more to ask for."""
        return self._inner.done

    @property
    def expected_gain(self) -> float | None:
        """What the strategy inside expects; nothing while pairs are measured."""
        return self._inner.expected_gain if self._corrected else None

    def start(self, dense: Tried) -> None:
        """Begin."""
        self._inner.start(dense)

    def ask(self, count: int) -> Sequence[Ask]:
        """Single steps and pairs on the first rung, then what the strategy inside asks for."""
        if self._queue:
            batch, self._queue = self._queue[:count], self._queue[count:]
            return [Ask(candidate, self._problem.rungs[0]) for candidate in batch]
        if not self._corrected:
            self._corrected = True
            for family in self._families:
                self._inner.begin_with(self._solutions(family))
        return self._inner.ask(count)

    def tell(self, answers: Sequence[Answer]) -> None:
        """Keep the harm of single steps and pairs; later answers are the inner strategy's."""
        if self._corrected:
            self._inner.tell(answers)
            return
        for candidate, tried in answers:
            if tried is not None:
                self._harm[candidate] = max(0.0, tried.drop if tried.kl is None else tried.kl)

    def _family(self, space: PlanSpace, risk: Risk, pairs: int) -> Family:
        additive = AdditiveProblem(
            space,
            step_risks(space, risk),
            savings(space, self._problem.ratio),
            limits=tuple(self._problem.feasible.sums.values()),
        )
        together: Counter[Pair] = Counter()
        for solution in additive.ladder(self._ratios):
            genome = space.genome(solution)
            steps = [(layer, letter) for layer, letter in enumerate(genome) if letter != RUN]
            together.update(combinations(steps, 2))
        # Neighbours first among the equally frequent ones: they are likeliest to depend on each other.
        order = sorted(together, key=lambda pair: (-together[pair], pair[1][0] - pair[0][0], pair))
        return Family(additive, tuple(order[:pairs]))

    def _to_measure(self, family: Family) -> list[Candidate]:
        steps = dict.fromkeys(step for pair in family.pairs for step in pair)
        wanted = [self._plan(family, (step,)) for step in steps] + [self._plan(family, pair) for pair in family.pairs]
        return [candidate for candidate in wanted if candidate in self._problem.space]

    def _plan(self, family: Family, steps: Sequence[Step]) -> Candidate:
        letters = [RUN] * self._problem.space.num_layers
        for layer, letter in steps:
            letters[layer] = letter
        return family.additive.space.candidate("".join(letters))

    def _solutions(self, family: Family) -> Sequence[Candidate]:
        """The ladder with measured single harms, and measured excesses of pairs, in place of the predicted risks."""
        steps = {step for pair in family.pairs for step in pair}
        single = {step: self._harm[plan] for step in steps if (plan := self._plan(family, (step,))) in self._harm}
        if not single:
            return ()
        risk = _on_measured_scale(family.additive.risk, single)
        excess = {
            pair: self._harm[plan] - single[pair[0]] - single[pair[1]]
            for pair in family.pairs
            if (plan := self._plan(family, pair)) in self._harm and pair[0] in single and pair[1] in single
        }
        corrected = replace(family.additive, risk=risk, pairs=excess)
        return [each for each in corrected.ladder(self._ratios) if self._problem.possible(each)]


def _on_measured_scale(predicted: Mapping[Step, float], measured: Mapping[Step, float]) -> dict[Step, float]:
    """Measured harms, and predicted risks of the other steps brought to the same total scale."""
    total = sum(predicted[step] for step in measured)
    scale = sum(measured.values()) / total if total > 0 else 0.0
    return {step: measured.get(step, scale * risk) for step, risk in predicted.items()}
