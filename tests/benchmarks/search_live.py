"""Search strategies on a live model with every action: evaluations are shared between runs through a cache.

    python tests/benchmarks/search_inputs.py --model smollm2-30 --kinds distance attention angular propagation causal
    python tests/benchmarks/search_live.py --model smollm2-30 --cache live.jsonl --runs live-runs.json

What theory seeds are worth within 15 and 30 plans of a model that is a directory, M:

    python tests/benchmarks/search_inputs.py --model M --name qwen2-10 --inputs . --dtype float32
    python tests/benchmarks/search_live.py --model M --name qwen2-10 --inputs . --dtype float32 --samples 64 --seeds 5
        --plans 30 --only surrogate --cache qwen2.jsonl --runs qwen2-runs.json

Runs as search_strategies.py does, but evaluates what is not in the cache, on one worker in this process. The cache
holds one line per plan and number of samples; an interrupted benchmark goes on where it was. Without compensation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from search_strategies import (
    CHECKPOINTS,
    FIXTURES,
    REFERENCE,
    SAMPLERS,
    Cache,
    load_inputs,
    print_gain,
    print_table,
    problem_of,
    run,
    shares,
)

from optimizer.job.sections import SearchSpec
from optimizer.job.spec import JobSpec
from optimizer.search.pareto import hypervolume
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.trial import Scores
from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.messages import NO_COMPENSATION, EvaluatePlans, Evaluation, ModelSource
from workers.tasks import load_spec, load_task

STRATEGIES = (
    ("surrogate", "theory"),
    ("surrogate", "random"),
    ("tpe", "none"),
    ("nsga2", "none"),
    ("random", "none"),
    ("skip-it", "-"),
    ("shortgpt", "-"),
    ("angular", "-"),
    ("shortv", "-"),
    ("vtw", "-"),
    ("sleb", "-"),
    ("evopress", "-"),
)
ONE_RUN = ("skip-it", "shortgpt", "angular", "shortv", "vtw", "sleb")
EVALUATIONS = (15, 30, 60)


class Live:
    """Evaluates plans on a worker, or reads them from the cache."""

    def __init__(self, handler: Handler, path: Path, samples: int) -> None:
        self._measurer, self._path, self._samples = handler, path, samples
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._known = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}

    def __call__(self, requests: Sequence[tuple[Candidate, int]]) -> Iterator[tuple[Candidate, Scores]]:
        for size, compensation in sorted({(size, candidate.compensation) for candidate, size in requests}):
            plans = [own.plan.text for own, asked in requests if (asked, own.compensation) == (size, compensation)]
            self._evaluate(
                [plan for plan in plans if key_of(plan, size, compensation) not in self._known], size, compensation
            )
        for candidate, size in requests:
            row = self._known[key_of(candidate.plan.text, size, candidate.compensation)]
            yield candidate, Scores(tuple(row["scores"]), row.get("failure"), tuple(row["kl"]) if row["kl"] else None)

    def _evaluate(self, plans: Sequence[str], size: int, compensation: str) -> None:
        if not plans:
            return
        reply = self._measurer.handle(EvaluatePlans(tuple(plans), "search", size, compensation))
        with self._path.open("a") as file:
            for plan, result in zip(plans, reply.results, strict=True):
                row: dict[str, Any] = {"key": key_of(plan, size, compensation), "scores": [], "kl": None}
                if isinstance(result, Evaluation):
                    kl = None if result.kl is None else [float(f"{value:.5g}") for value in result.kl]
                    row |= {"scores": list(result.scores), "kl": kl}
                else:
                    row["failure"] = result.reason
                self._known[row["key"]] = row
                file.write(json.dumps(row) + "\n")


def key_of(plan: str, size: int, compensation: str) -> str:
    """Name an evaluation in the cache."""
    return f"{plan} {size}" if compensation == NO_COMPENSATION else f"{plan} {size} {compensation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-30")
    parser.add_argument("--name", help="of the file that search_inputs.py wrote, where the model is a directory")
    parser.add_argument("--inputs", type=Path, default=FIXTURES, help="directory of that file")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--criterion", default=JobSpec.model_fields["criterion"].default, help="that seeds come from")
    parser.add_argument("--plans", type=int, default=EVALUATIONS[-1], help="that a run evaluates")
    parser.add_argument("--dtype", default="auto", help="float32 where the processor has no bfloat16 instructions")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="strategies to run")
    options = parser.parse_args()
    spec = load_spec(options.task)
    task = load_task(spec.with_splits(search=options.samples, held_out=1, unit="samples"))
    handler = Handler.load(
        ModelSource(options.model, device="cpu", dtype=options.dtype), task, WorkerSettings(worker=0, threads=1)
    )
    name = f"{options.name or options.model}/{task.name}"
    table, times = load_inputs(options.name or options.model, task.name, options.inputs)
    allowed = tuple("".join(letter for letter in own if letter in "RFBS") for own in handler.info.allowed_actions)
    space = PlanSpace(allowed, table.num_layers)
    evaluate, cache = Live(handler, options.cache, options.samples), Cache(options.runs)
    for strategy, seeds in STRATEGIES:
        if options.only and strategy not in options.only:
            continue
        for seed in range(1 if strategy in ONE_RUN else options.seeds):
            key = f"{name}/{strategy}/{seeds}/{seed}"
            if key in cache.runs:
                continue
            search = SearchSpec(
                trials=options.plans,
                strategy=strategy,
                seeds=seeds if strategy in SAMPLERS else "theory",
                seed=seed,
            )
            result = run(problem_of(space, table, times, options.samples, search, options.criterion), search, evaluate)
            cache.add(key, result)
            print(f"{key}: {result['evaluations']} plans in {result['seconds']:.1f} s", flush=True)
    everything = [(step[3], step[4]) for result in cache.runs.values() for step in result["steps"]]
    best, full = hypervolume(everything, REFERENCE), options.samples * table.num_layers
    plans = [each for each in EVALUATIONS if each <= options.plans]
    rows = {}
    for strategy, seeds in STRATEGIES:
        start = f"{name}/{strategy}/{seeds}/"
        results = [result for key, result in cache.runs.items() if key.startswith(start)]
        if results:
            by_cost = [shares(r["steps"], best, 0, np.array(CHECKPOINTS[:2]) * full) for r in results]
            rows[strategy, seeds] = [
                cost + shares(r["steps"], best, 1, plans) for cost, r in zip(by_cost, results, strict=True)
            ]
    heads = [*(f"{each} full" for each in CHECKPOINTS[:2]), *(f"{each} plans" for each in plans)]
    print_table(f"{name}: share of the best known hypervolume", heads, rows)
    print_gain(heads, rows)


if __name__ == "__main__":
    main()
