"""All search strategies on the same evaluations and budgets.

    python tests/benchmarks/search_strategies.py run --cache runs.json      # 12-layer model, both tasks: look-ups
    python tests/benchmarks/search_strategies.py masks --cache runs.json    # plans to evaluate held-out
    python tests/benchmarks/skip_only_table.py --task easy-vqa --masks masks-easy-vqa.txt --work DIRECTORY
    python tests/benchmarks/search_strategies.py report --cache runs.json --picture docs/images/search.svg

Every skip-only plan of the 12-layer model was evaluated once (tests/fixtures, written by skip_only_table.py), so runs
cost nothing but the strategies' own time. A run is kept in the cache as soon as it is done; an interrupted benchmark
goes on. Budgets are layer executions; one full evaluation is one dense pass over the search split. The hypervolume is
that of the completely evaluated plans' (latency ratio, drop) below the reference (1, 0.2), as a share of the best
known front's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[2]
FIXTURES = PROJECT / "tests" / "fixtures"
sys.path.insert(0, str(PROJECT))

from optimizer import criteria  # noqa: E402
from optimizer.job.sections import ConstraintSpec, SearchSpec  # noqa: E402
from optimizer.registries import SAMPLERS, STRATEGIES  # noqa: E402
from optimizer.search.budget import Budget, rung_sizes  # noqa: E402
from optimizer.search.constraints import Limits  # noqa: E402
from optimizer.search.latency import latency_ratio  # noqa: E402
from optimizer.search.loop import Search  # noqa: E402
from optimizer.search.pareto import Point, front_indices, hypervolume  # noqa: E402
from optimizer.search.problem import Problem  # noqa: E402
from optimizer.search.seeding import with_seeds  # noqa: E402
from optimizer.search.space import Candidate, PlanSpace  # noqa: E402
from optimizer.search.trial import Scores, Trial  # noqa: E402
from workers.redundancy.table import LayerMeasurement, LayerTable  # noqa: E402
from workers.runtime import SkipPlan  # noqa: E402

REFERENCE: Point = (1.0, 0.2)
CHECKPOINTS = (25, 50, 100, 200)
EVALUATIONS = (60, 200)
COMPARED = (
    ("surrogate", "theory"),
    ("surrogate", "random"),
    ("surrogate", "none"),
    ("tpe", "theory"),
    ("tpe", "none"),
    ("nsga2", "none"),
    ("gp", "none"),
    ("random", "none"),
    ("skip-it", "-"),
    ("shortgpt", "-"),
    ("angular", "-"),
    ("sleb", "-"),
    ("evopress", "-"),
)
SLOW = {"gp": 100}
"""Most plans of a strategy that takes seconds a proposal."""
DETERMINISTIC = ("skip-it", "shortgpt", "angular", "sleb")
"""Strategies without chance: one run stands for all seeds."""


@dataclass(frozen=True)
class Times:
    """A recorded latency profile."""

    dense_latency_seconds: float
    layer_seconds: Mapping[str, tuple[float, ...]]


@dataclass
class Recorded:
    """Evaluations of all skip-only plans, to be looked up; remembers what was asked so that nothing is asked twice."""

    layers: int
    right: np.ndarray
    kl: np.ndarray
    asked: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def load(cls, model: str, task: str) -> Recorded:
        with np.load(FIXTURES / f"skip_only_{model}_{task}.npz") as stored:
            samples = int(stored["samples"][0])
            right = np.unpackbits(stored["right_search"], axis=1, count=samples).astype(np.float64)
            return cls(int(np.log2(len(right))), right, stored["kl_search"])

    @property
    def samples(self) -> int:
        return self.right.shape[1]

    def __call__(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        for candidate, size in requests:
            if (str(candidate), size) in self.asked:
                raise RuntimeError(f"{candidate} was evaluated twice on {size} samples")
            self.asked.add((str(candidate), size))
            yield candidate, self.scores(mask_of(candidate.plan.text), size)

    def scores(self, mask: int, size: int) -> Scores:
        mean, error = self.kl[mask, 1 if size == self.samples else 0]
        # As many values as samples, with the recorded mean and standard error.
        spread = error * np.sqrt(size - 1)
        signs = np.where(np.arange(size) % 2 == 0, spread, -spread)
        return Scores(tuple(self.right[mask, :size]), None, tuple(np.asarray(mean + signs, dtype=float)))


def mask_of(plan: str) -> int:
    return sum(1 << layer for layer, letter in enumerate(plan) if letter == "S")


def plan_of(mask: int, layers: int) -> str:
    return "".join("S" if mask >> layer & 1 else "R" for layer in range(layers))


def load_inputs(model: str, task: str, directory: Path = FIXTURES) -> tuple[LayerTable, Times]:
    document = json.loads((directory / f"search_inputs_{model}_{task}.json").read_text())
    rows = tuple(
        LayerMeasurement(n, g, layer, value, None, count) for n, g, layer, value, count in document["measurements"]
    )
    times = document["latency"]
    seconds = {letter: tuple(layers) for letter, layers in times["layer_seconds"].items()}
    return LayerTable(document["num_layers"], rows), Times(times["dense_latency_seconds"], seconds)


def problem_of(
    space: PlanSpace, table: LayerTable, times: Times, samples: int, spec: SearchSpec, criterion: str = "skip-it"
) -> Problem:
    problem = Problem(
        space=space,
        limits=Limits(ConstraintSpec(max_accuracy_drop=REFERENCE[1]), times.dense_latency_seconds),
        ratio=partial(latency_ratio, times),
        rungs=rung_sizes(spec.rungs, samples),
        risk=criteria.load(criterion).risk(table),
        table=table,
        seed=spec.seed,
        batch=spec.batch,
    )
    return with_seeds(problem, spec) if spec.strategy in SAMPLERS else problem


def run(problem: Problem, spec: SearchSpec, evaluate: Any) -> dict[str, Any]:
    """One search; the complete plans in the order found, with what was spent by then."""
    budget = Budget(spec, lambda: 0.0)
    steps: list[tuple[int, int, str, float, float]] = []

    def note(trial: Trial) -> None:
        if trial.complete:
            genome = problem.space.genome(trial.candidate)
            steps.append((budget.layer_executions, budget.trials, genome, *trial.costs))

    started = time.perf_counter()
    outcome = Search(problem, STRATEGIES[spec.strategy](problem), budget, evaluate=evaluate, on_trial=note).run()
    seconds = time.perf_counter() - started
    return {"steps": steps, "stopped": outcome.stopped_because, "seconds": seconds, "evaluations": budget.trials}


def front_of(steps: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    return [steps[index] for index in front_indices([(step[3], step[4]) for step in steps])]


class Cache:
    """Finished runs in one JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.runs[key] = result
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.runs))
        part.replace(self.path)


def run_all(options: argparse.Namespace) -> None:
    cache = Cache(options.cache)
    for task in options.tasks:
        table, times = load_inputs(options.model, task)
        for strategy, seeds in COMPARED:
            if options.only and strategy not in options.only:
                continue
            for seed in range(1 if strategy in DETERMINISTIC else options.seeds):
                key = f"{options.model}/{task}/{strategy}/{seeds}/{seed}"
                if key in cache.runs:
                    continue
                recorded = Recorded.load(options.model, task)
                executions = CHECKPOINTS[-1] * recorded.samples * recorded.layers
                spec = SearchSpec(
                    trials=min(options.evaluations, SLOW.get(strategy, options.evaluations)),
                    layer_executions=executions,
                    strategy=strategy,
                    seeds=seeds if strategy in SAMPLERS else "theory",
                    seed=seed,
                )
                space = PlanSpace(("RS",) * recorded.layers, recorded.layers)
                result = run(problem_of(space, table, times, recorded.samples, spec), spec, recorded)
                cache.add(key, result)
                print(f"{key}: {result['evaluations']} plans in {result['seconds']:.1f} s", flush=True)


def shares(steps: Sequence[Sequence[Any]], best: float, column: int, limits: Sequence[float]) -> list[float]:
    """Share of the best hypervolume reached by every limit of what was spent (column of a step)."""
    return [hypervolume([(s[3], s[4]) for s in steps if s[column] <= limit], REFERENCE) / best for limit in limits]


def exhaustive_front(model: str, task: str) -> list[tuple[str, float, float]]:
    """The true front: plan, latency ratio, drop on the search split."""
    recorded = Recorded.load(model, task)
    _, times = load_inputs(model, task)
    accuracy = recorded.right.mean(axis=1)
    plans = [plan_of(mask, recorded.layers) for mask in range(len(accuracy) - 1)]  # the last one has no layer left
    points = [
        (latency_ratio(times, SkipPlan.parse(plan)), float(accuracy[0] - accuracy[mask]))
        for mask, plan in enumerate(plans)
    ]
    return [(plans[index], *points[index]) for index in front_indices(points)]


def runs_of(cache: Cache, model: str, task: str, strategy: str, seeds: str) -> list[dict[str, Any]]:
    start = f"{model}/{task}/{strategy}/{seeds}/"
    return [result for key, result in cache.runs.items() if key.startswith(start)]


def front_masks(results: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> set[int]:
    """Masks of all plans that are on a run's front when a limit is reached."""
    return {
        mask_of(step[2])
        for result in results
        for limit in limits
        for step in front_of([step for step in result["steps"] if step[0] <= limit])
    }


def write_masks(options: argparse.Namespace) -> None:
    cache = Cache(options.cache)
    for task in options.tasks:
        recorded = Recorded.load(options.model, task)
        limits = [each * recorded.samples * recorded.layers for each in CHECKPOINTS]
        results = [result for key, result in cache.runs.items() if key.startswith(f"{options.model}/{task}/")]
        on_true_front = {mask_of(plan) for plan, _, _ in exhaustive_front(options.model, task)}
        masks = sorted(front_masks(results, limits) | on_true_front)
        path = options.cache.with_name(f"masks-{task}.txt")
        path.write_text("\n".join(map(str, masks)) + "\n")
        print(f"{path}: {len(masks)} plans")


def held_out_drops(model: str, task: str) -> dict[int, float]:
    """Drop on the held-out split of every mask that skip_only_table.py evaluated there."""
    path = FIXTURES / f"held_out_{model}_{task}.csv"
    if not path.exists():
        return {}
    head, *lines = path.read_text().splitlines()
    samples = int(head.rpartition("_")[2])
    right = {int(mask): int(count) for mask, count in (line.split(",") for line in lines)}
    return {mask: (right[0] - count) / samples for mask, count in right.items()}


def held_out_share(steps: Sequence[Sequence[Any]], drops: Mapping[int, float], best: float, limit: float) -> float:
    """Held-out hypervolume of the front that the search split shows by a limit; as a share of the best."""
    front = front_of([step for step in steps if step[0] <= limit])
    return hypervolume([(step[3], drops[mask_of(step[2])]) for step in front], REFERENCE) / best


def print_table(title: str, heads: Sequence[str], rows: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> None:
    print(f"\n{title}\n")
    print("| strategy | seeds | " + " | ".join(heads) + " |")
    print("|---|---|" + "---|" * len(heads))
    for (strategy, seeds), values in rows.items():
        cells = [f"{np.median(column):.3f} ({min(column):.3f})" for column in zip(*values, strict=True)]
        print(f"| {strategy} | {seeds} | " + " | ".join(cells) + " |")


def bootstrap_gain(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two groups of runs and its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    draws = [random.choice(first, len(first)).mean() - random.choice(second, len(second)).mean() for _ in range(10_000)]
    return float(np.mean(first) - np.mean(second)), *map(float, np.quantile(draws, [0.025, 0.975]))


def print_gain(heads: Sequence[str], rows: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> None:
    """What the theory's seeds are worth, where both kinds of seeds were run."""
    theory, other = rows.get(("surrogate", "theory")), rows.get(("surrogate", "random"))
    if theory and other:
        print(f"\nTheory seeds ({len(theory)} runs) less random seeds ({len(other)}), mean and 95 % interval:\n")
        for column, head in enumerate(heads):
            gain, low, high = bootstrap_gain([row[column] for row in theory], [row[column] for row in other])
            print(f"- {head}: {100 * gain:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]")


def report(options: argparse.Namespace) -> None:
    cache = Cache(options.cache)
    for task in options.tasks:
        recorded = Recorded.load(options.model, task)
        true_front = exhaustive_front(options.model, task)
        best = hypervolume([(ratio, drop) for _, ratio, drop in true_front], REFERENCE)
        full = recorded.samples * recorded.layers
        limits = [each * full for each in CHECKPOINTS]
        found = {pair: runs_of(cache, options.model, task, *pair) for pair in COMPARED}
        found = {pair: results for pair, results in found.items() if results}
        heads = [*(f"{each} full" for each in CHECKPOINTS), *(f"{each} plans" for each in EVALUATIONS)]
        on_search = {
            pair: [shares(r["steps"], best, 0, limits) + shares(r["steps"], best, 1, EVALUATIONS) for r in results]
            for pair, results in found.items()
        }
        print_table(f"{task}, search split ({recorded.samples} samples): median (least) of runs", heads, on_search)
        print_gain(heads, on_search)
        drops = held_out_drops(options.model, task)
        if drops:
            _, times = load_inputs(options.model, task)
            ratios = {m: latency_ratio(times, SkipPlan.parse(plan_of(m, recorded.layers))) for m in drops}
            most = hypervolume([(ratios[mask], drop) for mask, drop in drops.items()], REFERENCE)
            on_held_out = {
                pair: [[held_out_share(r["steps"], drops, most, limit) for limit in limits] for r in results]
                for pair, results in found.items()
                if front_masks(results, limits) <= drops.keys()
            }
            print_table(f"{task}, held-out split: median (least) of runs", heads[: len(limits)], on_held_out)
        if options.picture:
            draw(options.picture.with_stem(f"{options.picture.stem}-{task}"), on_search)


def draw(path: Path, rows: Mapping[tuple[str, str], Sequence[Sequence[float]]]) -> None:
    """The medians over the budget, one line per strategy."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
    for (strategy, seeds), values in rows.items():
        medians = [float(np.median(column)) for column in zip(*values, strict=True)][: len(CHECKPOINTS)]
        style = {"linewidth": 2.5} if (strategy, seeds) == ("surrogate", "theory") else {"linewidth": 1.0}
        label = strategy if seeds == "-" else f"{strategy}, seeds: {seeds}"
        axes.plot(CHECKPOINTS, medians, marker="o", markersize=3, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CHECKPOINTS, [str(each) for each in CHECKPOINTS])
    axes.set_xlabel("budget in full evaluations of the dense model")
    axes.set_ylabel("share of the true front's hypervolume")
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "masks", "report"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--tasks", nargs="+", default=["easy-vqa", "scenes"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--only", nargs="*", help="strategies to run")
    parser.add_argument("--picture", type=Path, help="SVG file to draw")
    options = parser.parse_args()
    {"run": run_all, "masks": write_masks, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
