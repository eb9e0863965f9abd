"""Candidates per minute and layer executions, plain and fast, and whether both give the same scores.

    PYTHONPATH=. python tests/benchmarks/evaluation_engine.py --model llava-12 --samples 512 --threads 2

Three sets of plans: (i) one round of greedy elimination, that is every plan that skips one more layer than a given one;
(ii) a brood of 32 mutations of a plan, each with the action of one or two layers changed; (iii) 64 plans that leave the
lower third of the layers running. Both paths run in the same process, one after the other, on the same samples; the
plain path is `generate` in batches of 32. Its time is measured on ``--plain`` of the plans, spread over the set, and
scaled by the number of layer executions; with ``--plain 0`` on all of them. Time spent on asking tied samples again is
part of both. Times are given on the wall clock and as processor time of this process, which other work on the machine
disturbs less. The dense model and the parent of (i) and (ii) have been evaluated before on both paths, as in a search.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from math import comb

import torch

from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.layerwise.trie import Execute, build_trie
from workers.messages import EvaluatePlans, Evaluation, ModelSource
from workers.models.loading import load_model
from workers.runtime.plan import Action, SkipPlan
from workers.tasks import load_spec, load_task


@dataclass(frozen=True)
class Timed:
    seconds: float
    processor: float
    results: dict[str, Evaluation]

    @property
    def per_minute(self) -> float:
        return 60 * len(self.results) / self.seconds


def greedy_round(parent: SkipPlan) -> list[SkipPlan]:
    return [parent.with_action(layer, Action.SKIP) for layer in parent.kept]


def brood(parent: SkipPlan, count: int, actions: str, generator: random.Random) -> list[SkipPlan]:
    plans: set[SkipPlan] = set()
    while len(plans) < count:
        plan = parent
        for layer in generator.sample(range(len(parent)), generator.choice((1, 2))):
            plan = plan.with_action(layer, Action.of(generator.choice([a for a in actions if a != plan[layer].letter])))
        plans.add(plan)
    return sorted(plans)


def upper(layers: int, count: int, actions: str, generator: random.Random) -> list[SkipPlan]:
    plans: set[SkipPlan] = set()
    first, others = layers // 3, actions.replace("R", "")
    most = (layers - first) // 3
    while sum(comb(layers - first, changed) * len(others) ** changed for changed in range(1, most + 1)) < 2 * count:
        most += 1  # a short model has not as many plans with so few layers changed
    while len(plans) < count:
        plan = SkipPlan.dense(layers)
        for layer in generator.sample(range(first, layers), generator.randint(1, most)):
            plan = plan.with_action(layer, Action.of(generator.choice(others)))
        plans.add(plan)
    return sorted(plans)


def run(evaluator: PlainEvaluator | FastEvaluator, plans: list[SkipPlan], split: str, samples: int) -> Timed:
    request = EvaluatePlans(tuple(plan.text for plan in plans), split, samples)
    started = time.perf_counter(), time.process_time()
    results = evaluator.evaluate_all(request).results
    seconds, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    assert all(isinstance(result, Evaluation) for result in results), results
    return Timed(seconds, processor, {result.plan: result for result in results if isinstance(result, Evaluation)})


def compare(
    name: str, plain: PlainEvaluator, fast: FastEvaluator, plans: list[SkipPlan], split: str, samples: int, checked: int
) -> None:
    before = fast.walker.tally.executions
    quick = run(fast, plans, split, samples)
    spent = fast.walker.tally.executions - before
    chosen = plans if not checked else plans[:: max(1, len(plans) // checked)][:checked]
    slow = run(plain, chosen, split, samples)
    scale = sum(len(plan.kept) for plan in plans) / sum(len(plan.kept) for plan in chosen)
    slow_seconds = slow.seconds * scale
    different = {
        plan: sum(a != b for a, b in zip(result.scores, quick.results[plan].scores, strict=True))
        for plan, result in slow.results.items()
    }
    needed = sum(len(plan.kept) for plan in plans) * samples
    edges = sum(isinstance(node.step, Execute) for node in build_trie(plans).walk() if node.path)
    theory = edges * samples
    ties = statistics.mean(result.near_ties for result in quick.results.values())
    print(
        f"{name}: {len(plans)} plans, {samples} samples\n"
        f"  plain {slow_seconds:8.1f} s, {60 * len(plans) / slow_seconds:6.1f} candidates a minute, "
        f"{needed} layer executions ({len(chosen)} plans run)\n"
        f"  fast  {quick.seconds:8.1f} s, {quick.per_minute:6.1f} candidates a minute, {spent} layer executions "
        f"(the trie's own count {theory}, {spent / theory:.3f} of it)\n"
        f"  wall-clock ratio {slow_seconds / quick.seconds:.2f}, processor-time ratio "
        f"{slow.processor * scale / quick.processor:.2f}, layer executions {needed / spent:.2f} times fewer; "
        f"{sum(different.values())} of {len(chosen) * samples} scores differ; {ties:.1f} ties a plan, "
        f"mean accuracy {statistics.mean(result.accuracy for result in quick.results.values()):.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--split", default="search", choices=("search", "held_out"))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", type=int, default=0, help="plans of each set that the plain path runs; 0: all")
    parser.add_argument("--actions", default="RS", help="letters; a job's default is RS, all are RFBS")
    parser.add_argument("--skipped", type=int, default=4, help="layers that the parent of (i) and (ii) skips")
    parser.add_argument(
        "--parent", type=SkipPlan.parse, help="the parent of (i) and (ii); default: skips, evenly spread"
    )
    parser.add_argument("--sets", default="i,ii,iii")
    parser.add_argument("--memory", type=float, default=2.0, help="memory budget of the fast path in GiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="float32 where the processor has no bfloat16 instructions")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(ModelSource(arguments.model, dtype=arguments.dtype))
    task = load_task(load_spec(arguments.task))
    plain = PlainEvaluator(loaded, task)
    fast = FastEvaluator(plain, memory_bytes=int(arguments.memory * 2**30))
    started = time.perf_counter()
    split = arguments.split
    fast.check(split)
    checked = {id(part) for part in fast.chunks.kept}
    layers = fast.decoder.num_layers
    dense = SkipPlan.dense(layers)
    own = run(fast, [dense], split, arguments.samples).results[dense.text]
    chunks = [chunk for part in fast.chunks.kept if id(part) not in checked for chunk in part.chunks]
    tokens = sum(chunk.tokens for chunk in chunks)
    padding = tokens - sum(row.length for chunk in chunks for row in chunk.rows)
    print(
        f"{loaded.name}: {layers} layers, {task.name} ({split}), {loaded.model.dtype}, {torch.get_num_threads()} "
        f"threads; check, prompts and dense {time.perf_counter() - started:.1f} s, accuracy {own.accuracy:.3f}, "
        f"{tokens} packed tokens of which {padding / tokens:.1%} padding",
        flush=True,
    )
    generator = random.Random(arguments.seed)
    spread = [
        number * layers // arguments.skipped + layers // (2 * arguments.skipped) for number in range(arguments.skipped)
    ]
    parent = arguments.parent or SkipPlan.skipping(layers, spread)
    sets = {
        "i": ("(i) one greedy round", greedy_round(parent)),
        "ii": ("(ii) a brood of 32 mutations", brood(parent, 32, arguments.actions, generator)),
        "iii": ("(iii) 64 plans in the upper two thirds", upper(layers, 64, arguments.actions, generator)),
    }
    run(fast, [parent], split, arguments.samples)
    run(plain, [dense], split, arguments.samples)  # processed inputs are kept from here on
    for key in arguments.sets.split(","):
        compare(sets[key][0], plain, fast, sets[key][1], split, arguments.samples, arguments.plain)


if __name__ == "__main__":
    main()
