"""How far logits of one prompt depend on what else is computed with it: what the bound on ties has to cover.

    PYTHONPATH=. python tests/benchmarks/logit_noise.py --model llava-12 --samples 256 --threads 2

For the dense model and plans of all kinds, every sample's logits at the first position of its answer are computed
alone, in the plain path's batches and in the fast path's packed rows. Printed is by how much the lead of the best token
over each of the next seven differs from what it is alone, relative to the best logit (to 1 where that is smaller).
"""

from __future__ import annotations

import argparse
import random

import torch
from evaluation_engine import brood, run, upper
from torch import Tensor

from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.layerwise.trie import build_trie
from workers.messages import DEFAULT_BATCH_SIZE, ModelSource
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel, load_model
from workers.models.prompts import to_device
from workers.models.ties import tie_bound
from workers.runtime import apply
from workers.runtime.plan import SkipPlan
from workers.tasks import Sample, Task, load_spec, load_task

RIVALS = 8


def batched(loaded: LoadedModel, task: Task, plan: SkipPlan, samples: list[Sample], size: int) -> Tensor:
    logits = []
    with torch.inference_mode(), apply(loaded.model, plan):
        for first in range(0, len(samples), size):
            batch = prepare_batch(loaded, task, samples[first : first + size])
            assert batch.inputs is not None, batch.failed
            inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
            logits.append(loaded.model(**inputs).logits[:, -1].float())
    return torch.cat(logits)


def packed(fast: FastEvaluator, plan: SkipPlan, samples: list[Sample]) -> Tensor:
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for part in fast.chunks.of("search", samples, 0, fast.chunk_tokens):
            for chunk in part.chunks:
                ((_, states),) = fast.walker.ends(build_trie([plan]), chunk)
                logits = fast.decoder.logits(states)
                found.update(
                    (b.sample, logits[first]) for b, (first, _) in zip(chunk.samples, chunk.spans, strict=True)
                )
    return torch.stack([found[place] for place in range(len(samples))])


def noise(alone: Tensor, other: Tensor) -> Tensor:
    best = alone.topk(RIVALS, dim=-1).indices
    leads = [each.gather(1, best[:, :1]) - each.gather(1, best) for each in (alone, other)]
    return (leads[0] - leads[1]).abs().amax(1) / alone.amax(1).abs().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--plans", type=int, default=8, help="beside the dense one")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_model(ModelSource(arguments.model, dtype=arguments.dtype))
    task = load_task(load_spec(arguments.task))
    fast = FastEvaluator(PlainEvaluator(loaded, task))
    layers = fast.decoder.num_layers
    samples = list(task.split("search")[: arguments.samples])
    generator = random.Random(0)
    parent = SkipPlan.skipping(layers, [number * layers // 4 + layers // 8 for number in range(4)])
    plans = [*brood(parent, arguments.plans // 2, "RFBS", generator)]
    plans += upper(layers, arguments.plans - len(plans), "RFBS", generator)
    run(fast, [SkipPlan.dense(layers)], len(samples))
    for plan in (SkipPlan.dense(layers), *plans):
        alone = batched(loaded, task, plan, samples, 1)
        kinds = {
            "batches": noise(alone, batched(loaded, task, plan, samples, DEFAULT_BATCH_SIZE)),
            "packed rows": noise(alone, packed(fast, plan, samples)),
        }
        bound = tie_bound(alone.amax(1), loaded.model.dtype) / alone.amax(1).abs().clamp(min=1)
        print(
            f"{plan}: bound {bound.max():.1e}; "
            + "; ".join(f"{name} at most {each.max():.1e}, median {each.median():.1e}" for name, each in kinds.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
