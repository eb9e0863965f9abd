"""Price of general text in the calibration of maps: accuracy on the task against KL to dense on text, over the share.

    python tests/benchmarks/mixtures.py --model smollm2-30 --samples 128 --threads 1 --output mixtures.json

Every row is a fit at one share of general text: of the model's own (``own``), or of the file ``--fitted-text``. KL is
measured on ``--text``, another file. The layers that are skipped are the ten that docs/compensation.md names. The
search split, on which defaults are chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from optimizer.statistics.intervals import wilson_interval
from workers.compensation.recipe import Recipe, id_of_text
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.text_divergence import text_divergence
from workers.messages import EvaluatePlans, Evaluation, ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan
from workers.runtime.locate import locate
from workers.tasks import load_spec, load_task

SKIPPED = (3, 4, 5, 6, 7, 12, 13, 14, 17, 25)


def main() -> None:
    """Print a row a fit as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-30")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--recipe", default="linear tokens=8192")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.25, 0.5])
    parser.add_argument("--skip", type=int, nargs="+", default=list(SKIPPED))
    parser.add_argument("--fitted-text", help="a text to fit on, beside the model's own")
    parser.add_argument("--text", default="LICENSE")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--split", default="search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(ModelSource(options.model, dtype="float32", device="cpu"))
    sizes = {options.split: options.samples, "calibration": 1000, "calibration_per_image": 1, "unit": "samples"}
    task = load_task(load_spec(options.task).with_splits(**sizes))
    dispatch = EvaluationDispatch(PlainEvaluator(loaded, task), memory_bytes=2 << 30)
    plan = SkipPlan.skipping(len(locate(loaded.model).layers), options.skip)
    held_out = Path(options.text).read_text(encoding="utf-8")
    given = Path(options.fitted_text).read_text(encoding="utf-8") if options.fitted_text else None
    recipes: list[tuple[str, Recipe]] = []
    for share in options.shares:
        recipes.append(("own" if share else "none", Recipe.parse(f"{options.recipe} text_share={share}")))
        if share and given is not None:
            named = Recipe.parse(f"{options.recipe} text_share={share} text_id={id_of_text(given)}")
            recipes.append((Path(options.fitted_text).name, named))
    print("| text | share | accuracy | KL on the task | KL on text | loss on text (dense) | seconds |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for kind, recipe in recipes:
        started = time.perf_counter()
        request = EvaluatePlans((plan.text,), options.split, options.samples, compensation=recipe.text, text=given)
        (result,) = dispatch.evaluate(request).results
        assert isinstance(result, Evaluation), result
        divergence = text_divergence(loaded, plan, dispatch.plain.compensator.maps(plan, recipe.text), held_out)
        interval = wilson_interval(result.accuracy, result.n_samples, 0.95)
        kl = None if result.kl is None else statistics.fmean(result.kl)
        row = {
            "text": kind,
            "share": recipe.text_share,
            "recipe": recipe.text,
            "accuracy": result.accuracy,
            "interval": (interval.low, interval.high),
            "kl": kl,
            "text_kl": divergence.kl,
            "text_loss": divergence.plan_loss,
            "dense_text_loss": divergence.dense_loss,
            "text_tokens": divergence.tokens,
        }
        rows.append(row)
        print(
            f"| {kind} | {recipe.text_share:g} | {result.accuracy:.3f} [{interval.low:.3f}, {interval.high:.3f}] "
            f"| {'' if kl is None else f'{kl:.3g}'} | {divergence.kl:.3f} | {divergence.plan_loss:.2f} "
            f"({divergence.dense_loss:.2f}) | {time.perf_counter() - started:.0f} |",
            flush=True,
        )
        if options.output:
            options.output.write_text(json.dumps({"plan": plan.text, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
