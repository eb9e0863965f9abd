"""Search problems whose harms are known: per-sample answers that follow from planted single and pair harms."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optimizer.criteria import Risk
from optimizer.job.sections import ConstraintSpec, SearchSpec
from optimizer.registries import STRATEGIES
from optimizer.search.budget import Budget, rung_sizes
from optimizer.search.constraints import Limits
from optimizer.search.loop import Search
from optimizer.search.problem import Problem, Strategy
from optimizer.search.seeding import with_seeds
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.trial import Scores, SearchOutcome
from workers.redundancy.table import LayerMeasurement, LayerTable
from workers.runtime import SkipPlan

SAMPLES = 200


@dataclass
class Planted:
    """A sample is answered wrongly when its own fixed threshold falls below the plan's harm.

    Remembers what it was asked, and answers in a shuffled order.
    """

    singles: Mapping[tuple[int, str], float]
    pairs: Mapping[tuple[tuple[int, str], tuple[int, str]], float] = field(default_factory=dict)
    layers: int = 8
    fail: str | None = None
    order: int = 0
    samples: int = SAMPLES
    asked: list[tuple[str, int]] = field(default_factory=list)

    def harm(self, genome: str) -> float:
        steps = {(layer, letter) for layer, letter in enumerate(genome) if letter != "R"}
        harm = sum(self.singles[step] for step in steps)
        return max(0.0, harm + sum(more for (a, b), more in self.pairs.items() if a in steps and b in steps))

    def scores(self, candidate: Candidate, size: int) -> Scores:
        genome = candidate.plan.text
        if candidate.compensation != "none":
            genome = genome.replace("S", "C")
        if genome == self.fail:
            return Scores((), "worker died twice")
        harm = self.harm(genome)
        thresholds = np.random.default_rng(0).random(self.samples)[:size]
        noise = np.random.default_rng(sum(map(ord, genome))).lognormal(0, 0.3, self.samples)[:size]
        return Scores(tuple(float(t >= harm) for t in thresholds), None, tuple(float(2 * harm**2 * n) for n in noise))

    def __call__(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        self.asked += [(str(candidate), size) for candidate, size in requests]
        for candidate, size in random.Random(self.order).sample(list(requests), len(requests)):
            yield candidate, self.scores(candidate, size)


SMALL = (0.5, 0.01, 0.0, 0.2, 0.0, 0.02, 0.0, 0.6)
"""Harm of each of eight layers, whatever happens to it."""


def small(**fields: object) -> Planted:
    return Planted({(layer, letter): harm for layer, harm in enumerate(SMALL) for letter in "FBSCAMQP"}, **fields)


def risk_of(singles: Mapping[tuple[int, str], float], layers: int) -> Risk:
    return Risk("planted", {a: tuple(max(0.0, singles.get((i, a), 0.0)) for i in range(layers)) for a in "FBS"})


def problem_of(
    planted: Planted,
    letters: str = "RS",
    *,
    spec: SearchSpec | None = None,
    constraint: ConstraintSpec | None = None,
    max_touched: int | None = None,
    compensations: tuple[str, ...] = ("none",),
    table: LayerTable | None = None,
    seeded: bool = True,
) -> Problem:
    spec = spec or SearchSpec()
    space = PlanSpace((letters,) * planted.layers, max_touched or planted.layers, compensations)
    cost = {"R": 0.0, "F": 0.4, "B": 0.5, "S": 1.0, "A": 0.3, "M": 0.6, "Q": 0.1, "P": 0.3}
    problem = Problem(
        space=space,
        limits=Limits(constraint or ConstraintSpec(max_accuracy_drop=0.05), dense_latency_seconds=0.1),
        ratio=lambda plan: 1 - sum(cost[action.letter] for action in plan) / (planted.layers + 2),
        rungs=rung_sizes(spec.rungs, planted.samples),
        risk=risk_of(planted.singles, planted.layers),
        table=table or table_of(planted),
        seed=spec.seed,
        batch=spec.batch,
    )
    return with_seeds(problem, spec) if seeded else problem


def table_of(planted: Planted) -> LayerTable:
    """Measurements that published criteria read, as the planted single harms would show them."""
    rows = []
    for layer in range(planted.layers):
        skip = planted.singles.get((layer, "S"), 0.0)
        rows.append(LayerMeasurement("cosine_distance", "all", layer, skip, None, 1))
        for letter, part in (("A", "attention"), ("M", "mlp")):
            harm = planted.singles.get((layer, letter), 0.0)
            rows.append(LayerMeasurement(f"operator_distance@{part}", "all", layer, harm, None, 1))
        for letter, action in (("F", "freeze"), ("B", "bypass"), ("S", "skip")):
            harm = planted.singles.get((layer, letter), 0.0)
            rows.append(LayerMeasurement(f"layer_contribution@{action}", "last", layer, harm, None, 1))
        for length in range(1, planted.layers - layer + 1):
            block = sum(planted.singles.get((layer + step, "S"), 0.0) for step in range(length))
            rows.append(LayerMeasurement(f"angular_distance@{length}", "last", layer, block, None, 1))
    return LayerTable(planted.layers, tuple(rows))


def search(
    planted: Planted, letters: str = "RS", *, constraint: ConstraintSpec | None = None, **fields: object
) -> SearchOutcome:
    """Run a search on a planted problem; ``fields`` are the problem's or the job file's ``search`` fields."""
    own = {name: fields.pop(name) for name in ("max_touched", "compensations", "table") if name in fields}
    seeds = fields.pop("first", None)
    elapsed = fields.pop("elapsed", lambda: 0.0)
    spec = SearchSpec(**{"trials": 60, "rungs": (50,), "strategy": "tpe", **fields})
    problem = problem_of(planted, letters, spec=spec, constraint=constraint, **own)
    if seeds is not None:
        problem = replace(problem, seeds=tuple(Candidate(SkipPlan.parse(text)) for text in seeds))
    strategy: Strategy = STRATEGIES[spec.strategy](problem)
    return Search(problem, strategy, Budget(spec, elapsed), evaluate=planted).run()


def random_problem(layers: int, letters: str, seed: int, *, cubed: bool = False) -> Planted:
    """A larger instance: few indispensable layers, many nearly harmless ones, neighbours that need each other."""
    numbers = np.random.default_rng(seed)
    base = numbers.lognormal(-4.5, 1.2, layers)
    base[numbers.permutation(layers)[: max(2, layers // 8)]] += 0.3
    scale = {"F": 0.3, "B": 0.6, "S": 1.0, "C": 0.15, "A": 0.4, "M": 0.6, "Q": 0.1, "P": 0.2}
    singles = {
        (layer, letter): float(base[layer] * scale[letter] * numbers.lognormal(0, 0.3))
        for layer in range(layers)
        for letter in letters
        if letter != "R"
    }
    pairs = {}
    steps = list(singles)
    for first in steps:
        for second in steps:
            gap = second[0] - first[0]
            if gap == 1 or (gap > 1 and numbers.random() < 0.05):
                size = np.sqrt(singles[first] * singles[second])
                pairs[first, second] = float(size * numbers.normal(0.8 if gap == 1 else 0.0, 1.0))
    planted = Planted(singles, pairs, layers=layers, samples=400)
    return CubedPlanted(**vars(planted)) if cubed else planted


class CubedPlanted(Planted):
    """Harms that grow faster than their sum: no quadratic surrogate is exact here."""

    def harm(self, genome: str) -> float:
        plain = super().harm(genome)
        return plain + 4 * plain**3
