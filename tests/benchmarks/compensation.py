"""Plain skips against compensated ones: equal layer sets, equal accuracy, variants, calibration size, other tasks.

    PYTHONPATH=. python tests/benchmarks/compensation.py table --model llava-12 --samples 200

Parts: ``table`` (accuracy and mean KL to dense of both at equal layer sets), ``variants`` (how maps are fitted),
``tokens`` (calibration size), ``frontier`` (most layers within 1 and 3 points), ``elsewhere`` (fitted on one task,
measured on another), ``time`` (a fit against evaluation passes over the same tokens), ``rounding`` (folded weights
against explicit maps), ``redundancy`` (rank correlation of predicted with measured harm). Accuracies are those of the
first held-out samples, or with ``--split search`` of the split on which defaults are chosen; layer sets were chosen on
none of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from optimizer.search.seeds.blocks import best_blocks
from optimizer.search.space import PlanSpace
from workers.compensation.calibration import Calibration
from workers.compensation.linear_redundancy import linear_redundancy
from workers.compensation.recipe import Recipe
from workers.compensation.shared import SharedFits
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.layerwise.decoder import Decoder
from workers.messages import EvaluatePlans, Evaluation, ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply
from workers.runtime.gaps import gaps
from workers.runtime.locate import locate
from workers.tasks import Task, load_spec, load_task

SETS: dict[int, tuple[tuple[int, ...], ...]] = {
    12: ((4,), (4, 6), (4, 6, 8), (2, 4, 6, 8, 10), (4, 5, 6, 7, 8), (3, 4, 5, 7, 8, 9), (4, 5, 6, 7, 8, 10, 11)),
    30: (
        (13,),
        (3, 5, 6, 7, 13),
        (3, 4, 5, 6, 7, 12, 13, 14, 17, 25),
        (3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 16, 17, 22, 25),
        (3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18),
        (3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 22, 23, 24, 25, 26),
    ),
}
"""By number of layers: the sets that are skipped where none are named."""

VARIANTS = (
    "weighting=uniform",
    "weighting=answers",
    "source=dense",
    "ridge=0.1",
    "ridge=0.01",
    "ridge=0.0001",
    "drift=yes",
    "scope=projection",
    "drift=yes scope=projection",
    "drift=yes scope=projection ridge=0.0001",
)


class Bench:
    """One model and task, and both ways of skipping."""

    def __init__(self, loaded: LoadedModel, task: Task, samples: int, recipe: str, split: str = "held_out") -> None:
        self.loaded, self.task, self.split = loaded, task, split
        self.samples = min(samples, len(task.split(split)))
        self.evaluators = EvaluationDispatch(PlainEvaluator(loaded, task), memory_bytes=2 << 30)
        self.compensator = self.evaluators.plain.compensator
        self.recipe = recipe
        self.layers = len(locate(loaded.model).layers)

    def scores(self, plans: Sequence[SkipPlan], compensation: str) -> list[dict[str, Any]]:
        """Accuracy and mean KL to dense of every plan; None where it cannot be evaluated."""
        request = EvaluatePlans(tuple(p.text for p in plans), self.split, self.samples, compensation=compensation)
        found = []
        for result in self.evaluators.evaluate(request).results:
            if isinstance(result, Evaluation):
                kl = None if result.kl is None else statistics.fmean(result.kl)
                found.append({"accuracy": result.accuracy, "kl": kl})
            else:
                found.append({"failed": result.reason})
        return found

    def calibration(self) -> Calibration:
        """Of the recipe in use."""
        return self.compensator.calibration(Recipe.parse(self.recipe))


def table(bench: Bench, plans: Sequence[SkipPlan]) -> Any:
    """Both at equal layer sets, dense first."""
    dense = SkipPlan.dense(bench.layers)
    plain = bench.scores([dense, *plans], "none")
    repaired = bench.scores(plans, bench.recipe)
    rows = [{"layers": 0, "skipped": [], "plain": plain[0]}]
    for plan, one, other in zip(plans, plain[1:], repaired, strict=True):
        skipped = [layer for layer in range(len(plan)) if layer not in plan.kept]
        rows.append({"layers": len(skipped), "skipped": skipped, "plain": one, "compensated": other})
    return rows


def variants(bench: Bench, plans: Sequence[SkipPlan]) -> Any:
    """One line per way of fitting."""
    tokens = Recipe.parse(bench.recipe).tokens
    texts = [Recipe.parse(f"linear tokens={tokens} {each}").text for each in VARIANTS]
    return {text: bench.scores(plans, text) for text in texts}


def tokens(bench: Bench, plans: Sequence[SkipPlan]) -> Any:
    """Calibration sizes from 1k to 32k tokens."""
    base = Recipe.parse(bench.recipe)
    found = {}
    for size in (1024, 2048, 4096, 8192, 16384, 32768):
        text = replace(base, tokens=size).text
        used = bench.compensator.calibration(Recipe.parse(text))
        found[size] = {"tokens": used.tokens, "samples": len(used.samples), "scores": bench.scores(plans, text)}
    return found


def frontier(bench: Bench, plans: Sequence[SkipPlan]) -> Any:
    """Run structures of least predicted harm, of every size: the most layers within 1 and 3 points of dense."""
    space = PlanSpace(("R", *["RS"] * (bench.layers - 1)), bench.layers, ("none", bench.recipe))
    shares = linear_redundancy(bench.loaded, bench.calibration(), ridge=1e-3)
    found = best_blocks(space, {(each.layer, each.end): each.unexplained for each in shares})
    structures = [each.plan for each in found]
    dense = bench.scores([SkipPlan.dense(bench.layers)], "none")[0]["accuracy"]
    rows: dict[str, Any] = {"dense": dense}
    for compensation in ("none", bench.recipe):
        scored = list(zip(structures, bench.scores(structures, compensation), strict=True))
        sizes = [(len(plan) - len(plan.kept), plan.text, score) for plan, score in scored if "accuracy" in score]
        within = {
            f"within {points} points": max(
                ((size, text) for size, text, score in sizes if dense - score["accuracy"] <= points / 100),
                default=(0, ""),
            )
            for points in (1, 3)
        }
        rows[compensation] = {**within, "all": sizes}
    return rows


def elsewhere(bench: Bench, plans: Sequence[SkipPlan], other: Task) -> Any:
    """Maps of one task, and of the other task itself, measured on the other task."""
    there = Bench(bench.loaded, other, bench.samples, bench.recipe, bench.split)
    rows = []
    for plan, own, plain in zip(plans, there.scores(plans, there.recipe), there.scores(plans, "none"), strict=True):
        maps = bench.compensator.maps(plan, bench.recipe)
        moved = there.evaluators.plain.evaluate(plan, there.split, there.samples, maps=maps)
        rows.append({"plan": plan.text, "plain": plain, "fitted here": own, "fitted there": moved.accuracy})
    dense = there.scores([SkipPlan.dense(bench.layers)], "none")[0]
    return {"task": other.name, "dense": dense, "rows": rows}


def fit_time(bench: Bench, plans: Sequence[SkipPlan]) -> Any:
    """A fit alone, nothing shared, against the dense model's pass over the same tokens (the decoder alone)."""
    calibration = bench.calibration()
    recipe = Recipe.parse(bench.recipe)
    owner: Any = locate(bench.loaded.model).owner

    def dense_pass() -> None:
        with torch.inference_mode():
            for batch in calibration.batches:
                owner(*batch.args, **batch.kwargs)

    def fit_alone(plan: SkipPlan) -> None:
        SharedFits(Decoder(bench.loaded.model), calibration, recipe).fit(plan)

    rows = []
    for plan in plans:
        pairs = [(timed(dense_pass), timed(lambda plan=plan: fit_alone(plan))) for _ in range(3)]
        ratios = [fitted / passed for passed, fitted in pairs]
        rows.append({"plan": plan.text, "gaps": len(gaps(plan)), "fit / pass": statistics.median(ratios)})
    return {"tokens": calibration.tokens, "rows": rows}


def timed(call: Callable[[], None]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rounding(bench: Bench, plans: Sequence[SkipPlan]) -> Any:
    """Error of the answers' final states against explicit maps: folded weights, as a share of the states' size."""
    calibration, recipe = bench.calibration(), Recipe.parse(bench.recipe)
    owner: Any = locate(bench.loaded.model).owner
    rows = []
    for plan in plans:
        maps = bench.compensator.fitted(plan, recipe).maps
        batch = calibration.batches[0]
        with torch.inference_mode(), apply(bench.loaded.model, plan, maps):
            folded = owner(*batch.args, **batch.kwargs)[0].flatten(0, 1)[batch.kept].float()
        with torch.inference_mode(), apply(bench.loaded.model, plan), explicit(bench, maps):
            mapped = owner(*batch.args, **batch.kwargs)[0].flatten(0, 1)[batch.kept].float()
        rows.append({"plan": plan.text, "relative error": float((folded - mapped).norm() / mapped.norm())})
    return {"dtype": str(bench.loaded.model.dtype), "rows": rows}


class explicit:
    """Maps applied by hooks, in float32, to MLP outputs or to what the last projection is given. The layers are those
    that remain while a plan is applied.
    """

    def __init__(self, bench: Bench, maps: Any) -> None:
        kept = sorted({*range(bench.layers)} - {n for own in maps.values() for n in range(own.layer + 1, own.end + 1)})
        self._layers, self._maps = locate(bench.loaded.model).layers, {kept.index(k): own for k, own in maps.items()}

    def __enter__(self) -> None:
        self._handles = []
        for place, own in self._maps.items():
            mlp = self._layers[place].mlp
            module = mlp if own.scope == "output" else mlp.down_proj
            self._handles.append(module.register_forward_hook(partial(self._mapped, own)))

    def _mapped(self, own: Any, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        acted_on = out if own.scope == "output" else args[0]
        return (out.float() + acted_on.float() @ own.change.float().to(out.device)).to(out.dtype)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def redundancy(bench: Bench, plans: Sequence[SkipPlan], limit: int = 60) -> Any:
    """Spearman's rho between unexplained share and measured KL of single compensated gaps, at every so many pairs."""
    shares = linear_redundancy(bench.loaded, bench.calibration(), ridge=1e-3)
    step = max(1, len(shares) // limit)
    chosen = [each for each in shares[::step] if each.end - each.layer < bench.layers - 1]
    singles = [SkipPlan.skipping(bench.layers, range(each.layer + 1, each.end + 1)) for each in chosen]
    scored = bench.scores(singles, bench.recipe)
    pairs = [(each.unexplained, score["kl"]) for each, score in zip(chosen, scored, strict=True) if "kl" in score]
    rho, p = spearmanr(*zip(*pairs, strict=True))
    return {"pairs": len(pairs), "spearman": float(rho), "p": float(p)}


PARTS = {
    "table": table,
    "variants": variants,
    "tokens": tokens,
    "frontier": frontier,
    "time": fit_time,
    "rounding": rounding,
    "redundancy": redundancy,
}


def main() -> None:
    """Run one part and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "elsewhere"))
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--other", default="scenes", help="the other task of part elsewhere")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--split", default="held_out", choices=("search", "held_out"))
    parser.add_argument("--recipe", default="linear tokens=16384")
    parser.add_argument("--skip", action="append", help="layers of one set, for example 3,5-7; may be repeated")
    parser.add_argument("--images", type=int, help="calibrate on so many images, one question each")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(ModelSource(options.model, dtype=options.dtype))
    bench = Bench(
        loaded, task_of(options.task, options.images), options.samples, Recipe.parse(options.recipe).text, options.split
    )
    sets = SETS[bench.layers] if options.skip is None else [numbers(text) for text in options.skip]
    plans = [SkipPlan.skipping(bench.layers, each) for each in sets]
    if options.part == "elsewhere":
        found = elsewhere(bench, plans, task_of(options.other, options.images))
    else:
        found = PARTS[options.part](bench, plans)
    settings = {"model": loaded.name, "task": bench.task.name, "samples": bench.samples, "recipe": bench.recipe}
    text = json.dumps({"part": options.part, **settings, "found": found}, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def task_of(name: str, images: int | None) -> Task:
    """The task, with its own calibration split or one question about each of so many images."""
    spec = load_spec(name)
    if images is not None:
        sizes = {"calibration": images, "search": 1500, "held_out": 3000}
        spec = spec.with_splits(**sizes, unit="samples", calibration_per_image=1)
    return load_task(spec)


def numbers(text: str) -> tuple[int, ...]:
    """``"3,5-7"`` as layers 3, 5, 6, 7."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


if __name__ == "__main__":
    main()
