"""Prefill and decoding of a random-weight LLaVA with half its attention or half its MLPs left out, beside whole layers.

They are left out for every token, and for vision tokens alone.

    PYTHONPATH=. python tests/benchmarks/operators.py --rounds 15 --threads 2

The model is that of `runtime_prefill.py`. Every round times dense and every plan once, in an order drawn anew, and
ratios are taken within a round. The bound by operations counts the matrix products of the language backbone's layers:
the speed-up if every product ran at the same rate and nothing else took time. KV bytes are those of the cache at the
end of a request, each storage once.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from runtime_prefill import HIDDEN, INTERMEDIATE, LAYERS, VISION, backbone_timer, build, prompt, report
from transformers import LlavaForConditionalGeneration

from workers.latency.request import cache_bytes
from workers.runtime import SkipPlan, apply

PLANS = {
    "half without attention": "RA" * (LAYERS // 2),
    "half without MLP": "RM" * (LAYERS // 2),
    "half skipped": "RS" * (LAYERS // 2),
    "half with vision attention frozen": "RQ" * (LAYERS // 2),
    "half with vision MLP frozen": "RP" * (LAYERS // 2),
    "half frozen": "RF" * (LAYERS // 2),
    "all without attention": "A" * LAYERS,
}


def operations(plan: str, tokens: int, text: int, keys: int) -> float:
    """Multiply-adds times two of the layers for ``tokens`` new ones, ``text`` of them words.

    Attention is counted without causal savings.
    """

    def attention(queries: int) -> float:
        return 4 * (queries + tokens) * HIDDEN * HIDDEN + 4 * queries * keys * HIDDEN

    def mlp(rows: int) -> float:
        return 6 * rows * HIDDEN * INTERMEDIATE

    cost = {
        "R": attention(tokens) + mlp(tokens),
        "A": mlp(tokens),
        "M": attention(tokens),
        "Q": attention(text) + mlp(tokens),
        "P": attention(tokens) + mlp(text),
        "F": attention(text) + mlp(text),
        "S": 0.0,
    }
    return sum(cost[letter] for letter in plan)


def request(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], seconds: list[float], tokens: int
) -> tuple[float, float, int]:
    """Seconds of the backbone's prefill and of its mean step over some tokens, and the cache's bytes after them."""
    seconds.clear()
    output = model.generate(
        **inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True
    )
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    return seconds[0], statistics.fmean(seconds[1:]), cache_bytes(cache)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--text-tokens", type=int, default=64)
    arguments.add_argument("--new-tokens", type=int, default=17, help="the first comes from the prefill")
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that is shared")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    inputs = prompt(options.text_tokens)
    clock: Callable[[], float] = time.perf_counter if options.clock == "wall" else time.process_time
    seconds = backbone_timer(model, clock)
    plans = {"dense": "R" * LAYERS} | PLANS

    def measured(name: str) -> tuple[float, float, int]:
        with torch.inference_mode(), apply(model, SkipPlan.parse(plans[name])):
            return request(model, inputs, seconds, options.new_tokens)

    for name in plans:  # warm up
        measured(name)
    generator = random.Random(0)
    rounds: list[dict[str, tuple[float, float, int]]] = []
    for _ in range(options.rounds):
        order = list(plans)
        generator.shuffle(order)
        rounds.append({name: measured(name) for name in order})
    prompt_tokens = options.text_tokens + VISION
    dense = [each["dense"] for each in rounds]
    prefill, step = (statistics.median(own[number] for own in dense) for number in (0, 1))
    print(
        f"dense: prefill {prefill:.3f} s, a token {1000 * step:.1f} ms ({options.clock} clock), "
        f"{options.threads} threads, {prompt_tokens} prompt tokens, KV cache {dense[0][2] / 2**20:.1f} MiB"
    )
    phases = (("prefill", prompt_tokens, options.text_tokens), ("decoding", 1, 1))
    for number, (phase, *new) in enumerate(phases):
        for name in PLANS:
            ratios = [each[name][number] / each["dense"][number] for each in rounds]
            keys = prompt_tokens + (options.new_tokens // 2 if number else 0)
            bound = operations(plans["dense"], *new, keys) / operations(plans[name], *new, keys)
            report(f"{phase}, {name}", ratios, bound)
    for name in PLANS:
        print(f"KV cache, {name}: {rounds[0][name][2] / dense[0][2]:.3f} of dense")


if __name__ == "__main__":
    main()
