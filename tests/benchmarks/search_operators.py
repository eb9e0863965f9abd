"""What leaving out attention and MLPs is worth to a search: fronts of two sets of actions at equal layer executions.

    python tests/benchmarks/search_inputs.py --model llava-12 --dtype float32 --inputs . --calibration 48 \\
        --kinds distance attention angular operators propagation causal
    python tests/benchmarks/search_operators.py --model llava-12 --dtype float32 --inputs . --samples 64 \\
        --criterion skip-it --cache live.jsonl --runs runs.json

Every set is searched live with every seed (surrogate, seeds of the theory), until so many layer executions are spent;
evaluations are shared through the cache, and an interrupted benchmark goes on. It prints the share of the hypervolume
of the best front that all runs found together, and the mean difference to the first set with a 95 % bootstrap interval
over seeds. Latency is the measured profile's prediction. With ``--compensation`` the gaps of plans are compensated (all
of them, or as the search chooses), by maps that are fitted on the task's calibration samples alone; the measurements
need the kind `linear` then.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from search_live import Live
from search_strategies import (
    FIXTURES,
    REFERENCE,
    Cache,
    bootstrap_gain,
    front_of,
    load_inputs,
    problem_of,
    run,
    shares,
)

from optimizer.job.sections import CompensationSpec, SearchSpec
from optimizer.job.spec import JobSpec
from optimizer.search.pareto import hypervolume
from optimizer.search.space import PlanSpace
from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.messages import ModelSource
from workers.tasks import load_spec, load_task

UNLIMITED = 1_000_000


def report(name: str, results: dict[str, list[dict[str, Any]]], budgets: Sequence[int], full: int) -> None:
    """Print the table, the differences, and the letters of the plans on the best front."""
    everything = [step for runs in results.values() for result in runs for step in result["steps"]]
    best = hypervolume([(step[3], step[4]) for step in everything], REFERENCE)
    rows = {
        letters: [shares(result["steps"], best, 0, [each * full for each in budgets]) for result in runs]
        for letters, runs in results.items()
    }
    print(f"\n{name}: share of the best known hypervolume, median (least) of runs\n")
    print("| actions | runs | " + " | ".join(f"{each} full" for each in budgets) + " |")
    print("|---|---|" + "---|" * len(budgets))
    for letters, values in rows.items():
        cells = [f"{np.median(column):.3f} ({min(column):.3f})" for column in zip(*values, strict=True)]
        print(f"| {letters} | {len(values)} | " + " | ".join(cells) + " |")
    first, *others = rows
    for letters in others:
        print(f"\n{letters} less {first}, mean and 95 % interval:\n")
        for column, budget in enumerate(budgets):
            gain, low, high = bootstrap_gain(*([row[column] for row in rows[each]] for each in (letters, first)))
            print(f"- {budget} full: {100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
    front = {step[2]: step for step in front_of(everything)}
    print("\nbest front: " + ", ".join(f"{plan} ({step[3]:.3f}, {step[4]:.3f})" for plan, step in front.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--name", help="of the file that search_inputs.py wrote, where the model is a directory")
    parser.add_argument("--inputs", type=Path, default=FIXTURES, help="directory of that file")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--criterion", default=JobSpec.model_fields["criterion"].default, help="that seeds come from")
    parser.add_argument("--dtype", default="auto", help="float32 where the processor has no bfloat16 instructions")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--actions", nargs="+", default=["RFBS", "RFBSAM", "RFBSAMQP"], help="letters; the first set is compared to"
    )
    parser.add_argument("--compensation", choices=("none", "linear", "both"), default="none", help="of skipped layers")
    parser.add_argument("--budgets", nargs="+", type=int, default=[12, 25, 50], help="full evaluations of dense")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    options = parser.parse_args()
    task = load_task(load_spec(options.task).with_splits(search=options.samples, held_out=1, unit="samples"))
    source = ModelSource(options.model, device="cpu", dtype=options.dtype)
    handler = Handler.load(source, task, WorkerSettings(worker=0, threads=1))
    name = options.name or options.model
    table, times = load_inputs(name, task.name, options.inputs)
    compensations = CompensationSpec(kind=options.compensation, text_share=0.0).choices()
    full = options.samples * table.num_layers
    evaluate, cache = Live(handler, options.cache, options.samples), Cache(options.runs)

    def key(letters: str, seed: int) -> str:
        return f"{name}/{task.name}/{options.compensation}/{letters}/{seed}"

    for seed in range(options.seeds):
        for letters in options.actions:
            if key(letters, seed) in cache.runs:
                continue
            allowed = ("".join(each for each in own if each in letters) for own in handler.info.allowed_actions)
            space = PlanSpace(tuple(allowed), table.num_layers, compensations)
            # Seeds are made for twice as many plans as full evaluations: most plans end on the first rung.
            seeding = SearchSpec(trials=2 * max(options.budgets), seed=seed)
            spec = SearchSpec(trials=UNLIMITED, layer_executions=max(options.budgets) * full, seed=seed)
            problem = problem_of(space, table, times, options.samples, seeding, options.criterion)
            result = run(problem, spec, evaluate)
            cache.add(key(letters, seed), result)
            print(f"{key(letters, seed)}: {result['evaluations']} plans in {result['seconds']:.1f} s", flush=True)
        found = {letters: [cache.runs[key(letters, each)] for each in range(seed + 1)] for letters in options.actions}
        report(f"{name}/{task.name}", found, options.budgets, full)


if __name__ == "__main__":
    main()
