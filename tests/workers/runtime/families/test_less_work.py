"""Skipping has to save work: rows through the projections, calls of layers, and keys in the cache are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from workers.latency.request import cache_bytes
from workers.runtime import SkipPlan, apply

from .catalogue import by_name, model_of
from .comparing import greedy
from .tiny import CACHE, Family, Prompt, batch_inputs, decoder_layers, forget_positions, prompt_ids, vision_mask

FAMILY_NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "mistral3", "internvl", "glm4v", "gemma3")
families = pytest.mark.parametrize("family", [by_name(name) for name in FAMILY_NAMES], ids=str, scope="module")
PROMPT = Prompt((3, 0, 5, 0, 2), seed=6)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
FROZEN, BYPASSED, SKIPPED = 3, 4, 5
PLAN = "RRRFBSR"


@contextmanager
def rows_counted(model: PreTrainedModel, family: Family) -> Iterator[Counter[tuple[int, str]]]:
    """Rows (tokens) that go through each projection of each decoder layer of the whole model."""
    rows: Counter[tuple[int, str]] = Counter()
    handles = []

    def count(layer: int, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            rows[layer, name] += output.numel() // output.shape[-1]

        return hook

    for layer, block in enumerate(decoder_layers(model, family)):
        for path, module in block.named_modules():
            name = path.rsplit(".", 1)[-1]
            if name in PROJECTIONS:
                handles.append(module.register_forward_hook(count(layer, name)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def lengths(family: Family, prompt: Prompt) -> tuple[int, int]:
    """Numbers of all tokens and of text tokens."""
    ids = prompt_ids(family, prompt)
    return len(ids), int((~vision_mask(family, ids)).sum())


def prefill(model: PreTrainedModel, family: Family, prompts: list[Prompt]) -> Cache:
    forget_positions(model)
    with torch.no_grad():
        cache = model(**batch_inputs(family, prompts), use_cache=True)[CACHE]
    assert isinstance(cache, Cache)
    return cache


@families
@pytest.mark.parametrize("count", [1, 2])
def test_prefill_pushes_only_text_through_frozen_and_bypassed_layers(family: Family, count: int) -> None:
    model = model_of(family.name)
    prompts = [Prompt(PROMPT.segments, seed) for seed in range(count)]  # the same layout: nothing to pad
    tokens, text = (count * length for length in lengths(family, PROMPT))
    assert text < tokens
    with rows_counted(model, family) as rows, apply(model, SkipPlan.parse(PLAN)):
        prefill(model, family, prompts)
    for name in PROJECTIONS:
        assert rows[0, name] == tokens
        assert rows[SKIPPED, name] == 0
        assert rows[BYPASSED, name] == text
        assert rows[FROZEN, name] == (tokens if name in ("k_proj", "v_proj") else text), name


@families
def test_a_decoded_token_costs_one_row_in_every_layer_that_is_kept(family: Family) -> None:
    model = model_of(family.name)
    with apply(model, SkipPlan.parse(PLAN)):
        with rows_counted_kept(model) as rows:
            greedy(model, family, [PROMPT], 1)
        prefilled = dict(rows)
        with rows_counted_kept(model) as rows:
            greedy(model, family, [PROMPT], 4)
    assert {name: rows[name] - prefilled[name] for name in rows} == dict.fromkeys(rows, 3)
    assert len(rows) == 6 * len(PROJECTIONS)


@contextmanager
def rows_counted_kept(model: PreTrainedModel) -> Iterator[Counter[str]]:
    """Rows through the projections of what is in the model's decoder now, by name."""
    rows: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            rows[name] += output.numel() // output.shape[-1]

        return hook

    stacks = ("language_model.layers.", "text_model.layers.")
    handles = [
        module.register_forward_hook(count(name))
        for name, module in model.named_modules()
        if any(stack in name for stack in stacks) and name.rsplit(".", 1)[-1] in PROJECTIONS and "vision" not in name
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@families
def test_the_cache_holds_no_skipped_layer_and_no_bypassed_vision(family: Family) -> None:
    model = model_of(family.name)
    tokens, text = lengths(family, PROMPT)
    with apply(model, SkipPlan.parse(PLAN)):
        cache = prefill(model, family, [PROMPT])
    held = [int(layer.keys.shape[-2]) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len(held) == 6
    if family.name == "gemma3":  # sliding layers keep the last tokens of their window only
        assert held[4] <= text
        return
    assert held == [tokens, tokens, tokens, tokens, text, tokens]


def test_bytes_of_a_cache_are_those_of_the_tokens_that_each_layer_stores() -> None:
    family, positions = by_name("llava"), 8  # bytes of the place of each token that a bypassed layer stores
    tokens, text = lengths(family, PROMPT)
    stored = {"RRRRRRR": (7, 0), "BRRRBRR": (5, 2), "BBBBBBB": (0, 7), "ARMSRFB": (4, 1)}
    found = {}
    for plan in stored:
        with apply(model_of("llava"), SkipPlan.parse(plan)):
            found[plan] = cache_bytes(prefill(model_of("llava"), family, [PROMPT]))
    one = found["RRRRRRR"] / (7 * tokens)
    for plan, (whole, part) in stored.items():
        assert found[plan] == whole * tokens * one + part * text * (one + positions), plan


@families
def test_the_cache_of_a_skipped_first_layer(family: Family) -> None:
    plan = "S" + "R" * 6 if family.name != "qwen3_vl" else "RRS" + "R" * 4
    model = model_of(family.name)
    with apply(model, SkipPlan.parse(plan)):
        cache = prefill(model, family, [PROMPT])
    assert len([layer for layer in cache.layers if getattr(layer, "keys", None) is not None]) == 6
    assert cache.get_seq_length() == lengths(family, PROMPT)[0]


@families
def test_a_prompt_without_pictures_goes_through_frozen_and_bypassed_layers_whole(family: Family) -> None:
    model = model_of(family.name)
    with rows_counted(model, family) as rows, apply(model, SkipPlan.parse(PLAN)):
        prefill(model, family, [Prompt((7,), seed=1)])
    for name in PROJECTIONS:
        assert rows[FROZEN, name] == rows[BYPASSED, name] == 7
