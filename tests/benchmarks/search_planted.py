"""The surrogate on planted 30-layer problems: python tests/benchmarks/search_planted.py

Skip, freeze and bypass on 30 layers with single and pair harms (tests/helpers/planted.py). The criterion is the
single harms times a log-normal error of one standard deviation. Instances 500 on were not used to choose any setting.
Printed is the share of the best hypervolume that any of the strategies found, after 25, 50 and 100 plans: mean (least).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "helpers")]

import numpy as np  # noqa: E402
from planted import problem_of, random_problem, risk_of  # noqa: E402
from search_strategies import REFERENCE, run, shares  # noqa: E402

from optimizer.job.sections import ConstraintSpec, SearchSpec  # noqa: E402
from optimizer.search.pareto import hypervolume  # noqa: E402
from optimizer.search.seeding import with_seeds  # noqa: E402

STRATEGIES = (("surrogate", "theory"), ("surrogate", "random"), ("tpe", "theory"), ("random", "theory"))
PLANS = (25, 50, 100)
FIRST = 500


def one(strategy: str, seeds: str, instance: int, layers: int, plans: int) -> list[Any]:
    planted = random_problem(layers, "RFBS", instance)
    spec = SearchSpec(trials=plans, strategy=strategy, seeds=seeds, seed=instance - FIRST)
    random = np.random.default_rng(instance - FIRST)
    guess = {step: harm * float(random.lognormal(0, 1.0)) for step, harm in planted.singles.items()}
    constraint = ConstraintSpec(max_accuracy_drop=REFERENCE[1])
    problem = problem_of(planted, "RFBS", spec=spec, constraint=constraint, seeded=False)
    problem = with_seeds(replace(problem, risk=risk_of(guess, layers)), spec)
    steps: list[Any] = run(problem, spec, planted)["steps"]
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--instances", type=int, default=5)
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[list[float]]] = {pair: [] for pair in STRATEGIES}
    for instance in range(FIRST, FIRST + options.instances):
        found = {pair: one(*pair, instance, options.layers, PLANS[-1]) for pair in STRATEGIES}
        best = hypervolume([(step[3], step[4]) for steps in found.values() for step in steps], REFERENCE)
        for pair, steps in found.items():
            rows[pair].append(shares(steps, best, 1, PLANS))
    print("| strategy | seeds | " + " | ".join(f"{plans} plans" for plans in PLANS) + " |")
    print("|---|---|" + "---|" * len(PLANS))
    for (strategy, seeds), values in rows.items():
        cells = [f"{np.mean(column):.3f} ({min(column):.3f})" for column in zip(*values, strict=True)]
        print(f"| {strategy} | {seeds} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
