"""Prefill time of skip plans on a random-weight LLaVA: 24 layers, hidden size 1024, 576 vision tokens.

    PYTHONPATH=. python tests/benchmarks/runtime_prefill.py --rounds 15 --threads 2

Every round times the dense model and every plan once, in an order drawn anew, and ratios are taken within a round, so
that a machine whose speed drifts slows both sides of a ratio. Times are those of the language backbone (its decoder
stack, final norm and masks), read by hooks around it. The FLOP bound counts the matrix products of the backbone:
what the speed-up would be if every product ran at the same rate and nothing else took time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from workers.runtime import Action, SkipPlan, apply

IMAGE = 999
LAYERS, HIDDEN, INTERMEDIATE, HEADS = 24, 1024, 2816, 16
VISION = 576


def build() -> LlavaForConditionalGeneration:
    """The model; its vision tower is small, because only the backbone is timed."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=1000,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        ),
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def prompt(text_tokens: int) -> dict[str, Tensor]:
    """One picture between words: input_ids [1, 576 + text_tokens]."""
    words = torch.randint(1, 900, (1, text_tokens))
    ids = torch.cat([words[:, : text_tokens // 2], torch.full((1, VISION), IMAGE), words[:, text_tokens // 2 :]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 336, 336)}


def layer_flops(queries: int, keys: int, keys_made: int) -> float:
    """Multiply-adds times two of one layer: projections, attention products and MLP."""
    projections = 2 * (2 * queries + 2 * keys_made) * HIDDEN * HIDDEN
    attention = 4 * queries * keys * HIDDEN
    return projections + attention + 6 * queries * HIDDEN * INTERMEDIATE


def flops(plan: SkipPlan, text: int) -> float:
    """Multiply-adds times two of the decoder layers for one prompt (attention counted without causal savings)."""
    tokens = text + VISION
    cost = {
        Action.RUN: layer_flops(tokens, tokens, tokens),
        Action.FREEZE: layer_flops(text, tokens, tokens),
        Action.BYPASS: layer_flops(text, text, text),
        Action.SKIP: 0.0,
    }
    return sum(cost[action] for action in plan)


def backbone_timer(model: LlavaForConditionalGeneration, clock: Callable[[], float]) -> list[float]:
    """Seconds of every call of the language backbone, appended as calls happen."""
    seconds: list[float] = []
    started: list[float] = []
    backbone = model.model.language_model
    backbone.register_forward_pre_hook(lambda *_: started.append(clock()))
    backbone.register_forward_hook(lambda *_: seconds.append(clock() - started.pop()))
    return seconds


def report(name: str, ratios: list[float], bound: float | None = None) -> None:
    """Median of ``time / dense time`` over the rounds, its quartiles, and the speed-up beside its FLOP bound."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    line = f"{name:24s} time ratio {middle:.4f} (quartiles {low:.4f} .. {high:.4f}, n={len(ratios)})"
    if bound is not None:
        line += f"  speed-up {1 / middle:.3f}x, FLOP bound {bound:.3f}x"
    print(line, flush=True)


def applied_and_removed(model: LlavaForConditionalGeneration, plan: SkipPlan) -> float:
    """Seconds to put a plan on the model and take it off again."""
    started = time.perf_counter()
    with apply(model, plan):
        pass
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--text-tokens", type=int, default=64)
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that is shared")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    inputs = prompt(options.text_tokens)
    seconds = backbone_timer(model, time.perf_counter if options.clock == "wall" else time.process_time)
    half = range(1, LAYERS, 2)
    plans = {
        "all run": SkipPlan.dense(LAYERS),
        "half skipped": SkipPlan.skipping(LAYERS, half),
        "half frozen": SkipPlan.parse("".join("F" if layer in half else "R" for layer in range(LAYERS))),
        "half bypassed": SkipPlan.parse("R" * (LAYERS // 2) + "B" * (LAYERS - LAYERS // 2)),
        "half bypassed, alternate": SkipPlan.parse("RB" * (LAYERS // 2)),
    }

    def timed(run: Callable[[], object]) -> float:
        with torch.inference_mode():
            run()
        return seconds[-1]

    def under(plan: SkipPlan) -> float:
        with apply(model, plan):
            return timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    def bare() -> float:
        return timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    for plan in plans.values():  # warm up
        under(plan)
    bare()
    generator = random.Random(0)
    dense: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(options.rounds):
        order = ["dense", *plans]
        generator.shuffle(order)
        took = {name: bare() if name == "dense" else under(plans[name]) for name in order}
        dense.append(took["dense"])
        for name in plans:
            ratios[name].append(took[name] / took["dense"])
    print(
        f"dense backbone {statistics.median(dense):.3f} s ({options.clock} clock), {options.threads} threads, "
        f"{options.text_tokens} text tokens"
    )
    mixed = SkipPlan.parse("RFBS" * (LAYERS // 4))
    milliseconds = 1000 * statistics.median(applied_and_removed(model, mixed) for _ in range(30))
    print(f"applying and removing a plan with all four actions: {milliseconds:.1f} ms")
    total = flops(SkipPlan.dense(LAYERS), options.text_tokens)
    for name, plan in plans.items():
        report(name, ratios[name], total / flops(plan, options.text_tokens))


if __name__ == "__main__":
    main()
