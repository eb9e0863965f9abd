"""How well a guard tells other prompts apart: shares sent to the dense model, by task, score, features and layer.

    python tests/benchmarks/guard.py --model llava-12 --task easy-vqa --other scenes
    python tests/benchmarks/guard.py --model llava-12 --task scenes --other easy-vqa
    python tests/benchmarks/guard.py --model smollm2-30 --task easy-vqa --other scenes --images 100 110 100

``--compare`` adds the scores and features that were not taken. All are fitted on calibration images, get their
threshold from search images, and are counted on held-out images, one question an image. Others are: the other task's
held-out prompts; its images with this task's questions; pieces of a text as questions about this task's images; and
the same pieces alone. The last two lines are what one decision costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimizer.statistics.intervals import wilson_interval
from workers.guard.fit import conformal_threshold, fit_gaussian
from workers.guard.states import asking_text, one_per_image, task_features
from workers.latency.request import prepare_request, time_request
from workers.messages import ModelSource, Workload
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel, load_model
from workers.models.prompts import to_device
from workers.runtime.guard import Guard
from workers.tasks import Sample, load_spec, load_task

PIECES = 200
Score = Callable[[Tensor], Tensor]


def mahalanobis(features: Tensor) -> Score:
    """Return the score that guards use."""
    fitted = fit_gaussian(features)
    return Guard("", 0, **vars(fitted), threshold=0.0, false_alarms=0.5, fitted_on=0, threshold_on=0).score


def neighbours(features: Tensor, count: int = 5) -> Score:
    """Return the distance to the fifth nearest calibration prompt, all of unit length (Sun et al. 2022)."""
    unit = lambda rows: torch.nn.functional.normalize(rows.double(), dim=1)  # noqa: E731
    return lambda rows: torch.cdist(unit(rows), unit(features)).topk(count, largest=False).values[:, -1]


def diagonal(features: Tensor) -> Score:
    """Return the squared distance of standardised features, without their covariance."""
    fitted = fit_gaussian(features)
    return lambda rows: ((rows - fitted.mean) / fitted.scale).square().sum(1)


def relative(features: Tensor) -> Score:
    """Return Mahalanobis less the diagonal one (after Ren et al. 2021: a background of unrelated directions)."""
    own, background = mahalanobis(features), diagonal(features)
    return lambda rows: own(rows) - background(rows)


SCORES = {"mahalanobis": mahalanobis, "relative": relative, "diagonal": diagonal, "neighbours": neighbours}
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "text + vision": lambda rows: rows,
    "text": lambda rows: torch.cat([rows.chunk(2, 1)[0]] * 2, 1),
    "vision": lambda rows: torch.cat([rows.chunk(2, 1)[1]] * 2, 1),
}
"""A single mean stands twice, since the fit takes two kinds of tokens; that changes no order of scores."""


def text_alone(loaded: LoadedModel, pieces: list[str], layers: list[int]) -> dict[int, Tensor]:
    """Return the features of pieces of text without an image, through the chat template."""
    from workers.guard.states import input_features

    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for piece in pieces:
        turn = {"role": "user", "content": [{"type": "text", "text": piece}]}
        inputs = loaded.processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        for layer, rows in input_features(loaded, inputs, layers).items():
            found[layer].append(rows)
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def collect(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, dict[int, Tensor]]:
    """Return the features of every kind of prompt by layer."""
    sizes = dict(zip(("calibration", "search", "held_out"), options.images, strict=True))
    task, other = (
        load_task(load_spec(name).with_splits(**sizes, unit="images")) for name in (options.task, options.other)
    )
    text = Path(options.text).read_text(encoding="utf-8")
    held_out, its = one_per_image(task.held_out), one_per_image(other.held_out)
    crossed: list[Sample] = [replace(mine, image=theirs.image) for mine, theirs in zip(held_out, its, strict=False)]
    texts, asked = asking_text(task, held_out[:PIECES], text)
    kinds: dict[str, tuple[Any, Any]] = {
        "calibration": (task, one_per_image(task.calibration)),
        "search": (task, one_per_image(task.search)),
        "held-out": (task, held_out),
        f"{options.other}": (other, its),
        f"{options.other}'s images, own questions": (task, crossed),
        "text about own images": (texts, asked),
    }
    found = {name: task_features(loaded, own, samples, options.layers)[0] for name, (own, samples) in kinds.items()}
    found["text alone"] = text_alone(loaded, [sample.question for sample in asked], options.layers)
    return found


def cost(loaded: LoadedModel, options: argparse.Namespace, guard: Guard) -> dict[str, float]:
    """Return milliseconds of one prompt: to the decision, of the score, and of a dense request; medians, in turns."""
    task = load_task(load_spec(options.task).with_splits(calibration=4, search=4, held_out=4, unit="samples"))
    batch = prepare_batch(loaded, task, task.calibration[:1])
    assert batch.inputs is not None
    inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
    request = prepare_request(loaded, task, Workload(1, 2))
    row = torch.zeros(1, len(guard.mean))
    acts = {
        "decision": lambda: guard.admits(loaded.model, **inputs),
        "score": lambda: guard.inside(row),
        "dense request": lambda: time_request(loaded, request),
    }
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(options.repeats + 1):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            taken[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(seconds[1:]) for name, seconds in taken.items()}


def main() -> None:
    """Print a row a layer, and JSON with ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--other", default="scenes")
    parser.add_argument("--text", default="LICENSE")
    parser.add_argument("--images", type=int, nargs=3, default=[200, 300, 400], help="calibration, search, held-out")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(ModelSource(options.model, dtype="float32", device="cpu"))
    found = collect(loaded, options)
    asked = [name for name in found if name not in ("calibration", "search")]
    print(
        "| layer | score | features | "
        + " | ".join(f"{name} ({len(found[name][options.layers[0]])})" for name in asked)
        + " |"
    )
    print("|---|---|---|" + "---:|" * len(asked))
    rows: list[dict[str, Any]] = []
    kinds = [(score, features) for score in SCORES for features in FEATURES]
    for layer in options.layers:
        for score, features in kinds if options.compare else kinds[:1]:
            pick = FEATURES[features]
            own = SCORES[score](pick(found["calibration"][layer]))
            threshold = conformal_threshold(own(pick(found["search"][layer])), options.rate)
            shares = {name: float((own(pick(found[name][layer])) > threshold).double().mean()) for name in asked}
            cells = []
            for name, share in shares.items():
                interval = wilson_interval(share, len(found[name][layer]), 0.95)
                cells.append(f"{100 * share:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]")
            print(f"| {layer} | {score} | {features} | " + " | ".join(cells) + " |", flush=True)
            rows.append({"layer": layer, "score": score, "features": features, "sent": shares})
    fitted = fit_gaussian(found["calibration"][max(options.layers)])
    guard = Guard("", max(options.layers), **vars(fitted), threshold=1e9, false_alarms=0.5, fitted_on=0, threshold_on=0)
    milliseconds = cost(loaded, options, guard)
    print("milliseconds of one prompt: " + ", ".join(f"{name} {each:.2f}" for name, each in milliseconds.items()))
    if options.output:
        options.output.write_text(json.dumps({"rows": rows, "milliseconds": milliseconds}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
