"""Layers without attention or without an MLP, for every token or for vision tokens alone, on every family.

The references compute and then discard.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from workers.layerwise.decoder import Decoder
from workers.runtime import Action, PlanError, SkipPlan, apply, apply_permanently, describe
from workers.runtime.cache_lengths import KeylessLayer, keyless_layer
from workers.runtime.token_rows import TokenSplit

from .catalogue import (
    ONE_PICTURE,
    TEXT_ONLY,
    TWO_PICTURES,
    batch_of,
    by_name,
    every_family,
    model_of,
    prompts_of,
    single,
)
from .comparing import assert_close, distance, greedy, plain_logits, supported
from .expected import expected_generation, expected_logits
from .references import reference_plan
from .test_families import check_generation, planned_logits, snapshot
from .test_generation import LENGTH, beam_reference, check_against_reference, generate
from .test_less_work import PROMPT, lengths, prefill, rows_counted
from .tiny import CACHE, Family, batch_inputs, build, decoder_layers, prompt_ids, vision_mask

WHOLE = ("gemma3n", "gemma3n_text", "gemma4", "qwen4_exp", "glm5_next", "mistral_large4")
"""Per-layer inputs, several residual streams, or an index that is handed from layer to layer."""


PARTS = "AMQP"


def refused(family: Family, layer: int) -> set[str]:
    """The letters of the four actions that a layer must decline, from what the configuration says of it.

    Attention is asked by text alone where it may be in a frozen layer.
    """
    text = model_of(family.name).config.get_text_config()
    if family.name in WHOLE or layer in (getattr(text, "cross_attention_layers", None) or ()):
        return set(PARTS)
    descriptor = describe(model_of(family.name))
    found = set() if descriptor.vision_token_ids else {"Q", "P"}
    if Action.FREEZE not in descriptor.allowed[layer]:
        found.add("Q")
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * family.layers
    sharing = getattr(text, "kv_sharing_modes", None)
    if kinds[layer] not in ("full_attention", "sliding_attention", "chunked_attention") or (
        sharing is not None and sharing[layer] == "store" and "reuse" in sharing
    ):
        found.add("A")
    return found


def plan_of(family: Family, seed: int, letters: str = "RAM") -> str:
    """A random plan that leaves out all parts of which there are letters, where a layer may; the same in every run."""
    generator = random.Random(f"{family.name} {seed} {letters}")
    other = {layer: family.refused.get(layer, "") + family.may_refuse.get(layer, "") for layer in range(family.layers)}
    choices = [
        [letter for letter in letters if letter not in refused(family, layer) | set(other[layer])]
        for layer in range(family.layers)
    ]
    wanted = {letter for own in choices for letter in own} & set(PARTS)
    for _ in range(1000):
        plan = "".join(generator.choice(own) for own in choices)
        if wanted <= set(plan) and family.possible(plan):
            return plan
    raise AssertionError("no plan leaves out all of them")


@every_family
def test_exactly_the_layers_that_cannot_be_taken_apart_are_refused(family: Family) -> None:
    model = supported(family)
    descriptor = describe(model)
    for layer in range(family.layers):
        found = {letter for letter in PARTS if Action.of(letter) not in descriptor.allowed[layer]}
        assert found == refused(family, layer), f"layer {layer}"
        for letter in found:
            reason = descriptor.reason(layer, Action.of(letter))
            with pytest.raises(PlanError, match=f"layer {layer} cannot take {letter} ") as caught:
                apply(model, SkipPlan.parse(single(family, layer, letter)))
            assert str(caught.value).endswith(reason) and len(reason) > 20


@every_family
def test_logits_and_cached_generation(family: Family) -> None:
    model = supported(family)
    if family.name in WHOLE:
        pytest.skip(f"{family.name}: attention and MLP of its layers cannot be told apart, and the plan is refused")
    prompt, plan = ONE_PICTURE if family.multimodal else TEXT_ONLY, plan_of(family, 0)
    expected = expected_logits(family, plan, prompt)
    assert_close(family, planned_logits(model, family, plan, prompt), expected, f"{plan} {prompt}")
    check_generation(family, plan_of(family, 1, "RAMQPFBS"), batch_of(family))


@pytest.mark.slow
@every_family
def test_every_layer_and_many_plans(family: Family) -> None:
    model = supported(family)
    if family.name in WHOLE:
        pytest.skip(f"{family.name}: attention and MLP of its layers cannot be told apart, and the plan is refused")
    for layer in range(family.layers):
        for letter in set(PARTS) - refused(family, layer):
            plan = single(family, layer, letter)
            for prompt in prompts_of(family):
                expected = expected_logits(family, plan, prompt)
                assert_close(family, planned_logits(model, family, plan, prompt), expected, f"{plan} {prompt}")
    for seed in range(2, 12):
        check_generation(family, plan_of(family, seed, ("RAMQPFBS", "RQP")[seed % 2]), batch_of(family))


@every_family
def test_a_model_for_good_has_lost_the_parts(family: Family) -> None:
    supported(family)
    if family.name in WHOLE:
        pytest.skip(f"{family.name}: attention and MLP of its layers cannot be told apart, and the plan is refused")
    model = build(family)
    plan, prompt = plan_of(family, 0), prompts_of(family)[0]
    expected = expected_logits(family, plan, prompt)
    before = [sum(each.numel() for each in layer.parameters()) for layer in decoder_layers(model, family)]
    apply_permanently(model, SkipPlan.parse(plan))
    assert_close(family, plain_logits(model, family, prompt), expected, plan)
    layers = decoder_layers(model, family)
    for layer, (letter, count) in enumerate(zip(plan, before, strict=True)):
        left = sum(each.numel() for each in layers[layer].parameters())
        assert left == count if letter == "R" else left < count, f"layer {layer}"
    ids, logits = greedy(model, family, [prompt], 3)[0]
    expected_ids, expected = expected_generation(family, plan, prompt, 3, guess=ids)
    assert_close(family, logits, expected, plan)
    assert ids == expected_ids


SOME = ("llava", "qwen2_vl", "gemma3", "aya_vision", "llava over phi")
"""Pre-norms, multimodal rotary positions, sliding windows with norms on both sides, a parallel block, layer norms."""
some_families = pytest.mark.parametrize("family", [by_name(name) for name in SOME], ids=str, scope="module")
FIRST = "AQPMRAPQ"
"""The first layer, from which transformers reads the length of the sequence, has no keys."""


def first(family: Family) -> str:
    return FIRST[: family.layers].ljust(family.layers, "R")


@some_families
def test_beams_of_a_padded_batch(family: Family) -> None:
    model = model_of(family.name)
    plan, prompts = first(family), [ONE_PICTURE, prompts_of(family)[1]]
    expected = [beam_reference(family, plan, prompt, 3) for prompt in prompts]
    with apply(model, SkipPlan.parse(plan)):
        assert generate(model, family, prompts, num_beams=3, do_sample=False) == expected


@some_families
@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_static_caches_and_caches_that_are_cropped(family: Family, settings: dict[str, Any]) -> None:
    model, plan = model_of(family.name), first(family)
    with apply(model, SkipPlan.parse(plan)):
        if "cache_implementation" in settings:
            found = greedy(model, family, [ONE_PICTURE], LENGTH, **settings)
            check_against_reference(family, plan, [ONE_PICTURE], found)
        else:
            expected_ids, _ = expected_generation(family, plan, ONE_PICTURE, LENGTH)
            assert generate(model, family, [ONE_PICTURE], do_sample=False, **settings) == [expected_ids]


@some_families
def test_what_is_left_out_costs_no_row_and_no_key(family: Family) -> None:
    model, plan = model_of(family.name), first(family)
    tokens, text = lengths(family, PROMPT)
    assert text < tokens
    with rows_counted(model, family) as rows, apply(model, SkipPlan.parse(plan)):
        cache = prefill(model, family, [PROMPT])
    mlp = "fc2" if family.name == "llava over phi" else "down_proj"
    with rows_of(model, family, mlp) as mlp_rows, apply(model, SkipPlan.parse(plan)):
        prefill(model, family, [PROMPT])
    for layer, letter in enumerate(plan):
        for name in ("k_proj", "v_proj"):
            assert rows[layer, name] == (0 if letter == "A" else tokens), (layer, name)
        assert rows[layer, "q_proj"] == {"A": 0, "Q": text}.get(letter, tokens), layer
        assert mlp_rows[layer] == {"M": 0, "P": text}.get(letter, tokens), layer
        entry = cache.layers[layer]
        assert isinstance(entry, KeylessLayer) == (letter == "A")
        assert (entry.keys is None) == (letter == "A")
        assert entry.get_seq_length() == tokens


class rows_of:
    """Rows through one projection of every decoder layer."""

    def __init__(self, model: PreTrainedModel, family: Family, name: str) -> None:
        self._modules = [
            next(module for path, module in layer.named_modules() if path.rsplit(".", 1)[-1] == name)
            for layer in decoder_layers(model, family)
        ]
        self._rows = dict.fromkeys(range(family.layers), 0)

    def __enter__(self) -> dict[int, int]:
        def count(layer: int) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                self._rows[layer] += output.numel() // output.shape[-1]

            return hook

        self._handles = [module.register_forward_hook(count(layer)) for layer, module in enumerate(self._modules)]
        return self._rows

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@some_families
def test_a_model_is_restored_bitwise(family: Family) -> None:
    model, plan = model_of(family.name), first(family)
    greedy(model, family, [ONE_PICTURE], 2)
    before, logits = snapshot(model), plain_logits(model, family, ONE_PICTURE)
    with apply(model, SkipPlan.parse(plan)):
        assert distance(plain_logits(model, family, ONE_PICTURE), logits) > family.tolerance
        greedy(model, family, [ONE_PICTURE], 2)
    after = snapshot(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(plain_logits(model, family, ONE_PICTURE), logits)


@some_families
def test_freezing_is_freezing_both_parts(family: Family) -> None:
    """Frozen layers, and layers that freeze one part by the runtime and the other by the reference's hooks."""
    model = model_of(family.name)
    for prompt in prompts_of(family):
        expected = planned_logits(model, family, "F" * family.layers, prompt)
        ids = prompt_ids(family, prompt)
        with reference_plan(model, family, "Q" * family.layers, ids):
            found = planned_logits(model, family, "P" * family.layers, prompt)
        assert_close(family, found, expected, f"{prompt}")
        with (
            reference_plan(model, family, "Q" * family.layers, ids),
            reference_plan(model, family, "P" * family.layers, ids),
        ):
            assert_close(family, plain_logits(model, family, prompt), expected, f"{prompt}")


def test_a_second_turn_goes_on_from_the_lengths_of_the_first() -> None:
    family = by_name("llava")
    model, plan = model_of("llava"), "AQRMPAR"
    expected = expected_logits(family, plan, TWO_PICTURES)
    inputs = batch_inputs(family, [TWO_PICTURES])
    ids = inputs["input_ids"]
    with torch.no_grad(), apply(model, SkipPlan.parse(plan)):
        begun = model(**{**inputs, "input_ids": ids[:, :-2], "attention_mask": torch.ones_like(ids[:, :-2])})
        ended = model(input_ids=ids[:, -2:], attention_mask=torch.ones_like(ids), **{CACHE: begun[CACHE]})
    assert_close(family, torch.cat([begun.logits, ended.logits], 1)[0], expected, plan)


def test_an_offloaded_cache_fetches_the_layer_behind_one_without_keys() -> None:
    """Which layer an offloaded cache fetches is told by its parts: only a GPU offloads to another device."""
    cache = DynamicCache()
    for layer in (0, 2):
        cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), layer)
        cache.layers[layer].device = torch.device("meta")  # where it computes
    keyless_layer(cache, 1)
    for fetched in (["cpu", "meta"], ["meta", "meta"]):  # the next one, then from the beginning
        cache.layers[1].prefetch()
        assert [cache.layers[layer].keys.device.type for layer in (0, 2)] == fetched


def test_scores_of_routers_are_refused_where_not_every_token_reaches_every_expert() -> None:
    family = by_name("qwen3_vl_moe")
    model, inputs = model_of(family.name), batch_inputs(family, [ONE_PICTURE])
    for letter in "FPM":
        with apply(model, SkipPlan.parse(single(family, 1, letter))), pytest.raises(PlanError, match="router_logits"):
            model(**inputs, output_router_logits=True)
    with torch.no_grad():
        dense = model(**inputs, output_router_logits=True).router_logits
        with apply(model, SkipPlan.parse(single(family, 1, "A"))):
            found = model(**inputs, output_router_logits=True).router_logits
    assert [each.shape for each in found] == [each.shape for each in dense]


def test_some_rows_without_attention_are_given_their_own_rows_of_what_the_mlp_reads() -> None:
    """Ernie's experts are chosen by each token's kind, which the layer is given for all tokens."""
    model = model_of("ernie4_5_vl_moe")
    decoder, tokens = Decoder(model), 6
    states = torch.randn(1, tokens, model.config.get_text_config().hidden_size)
    arguments = {"position_embeddings": None, "moe_mm_token_type_ids": torch.tensor([[1, 1, 1, 0, 1, 0]])}
    last = torch.arange(tokens)[None] >= 3
    split = TokenSplit.from_vision_mask(~last)
    assert split is not None
    with torch.no_grad():
        every = decoder.run_rows(1, Action.SKIP_ATTENTION, None, states, arguments).hidden
        some = decoder.run_text(1, Action.SKIP_ATTENTION, split, states, arguments).hidden
    torch.testing.assert_close(some[last], every[last])
    assert torch.equal(some[~last], states[~last])


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_mask_given_by_hand_holds_in_layers_that_know_no_length(name: str) -> None:
    """Layers of linear attention keep no count of tokens: it is that of an attention layer before or behind them."""
    family = by_name(name)
    model, plan = model_of(name), "P" * family.layers
    expected_ids, expected = expected_generation(family, plan, ONE_PICTURE, 3)
    inputs = batch_inputs(family, [ONE_PICTURE])
    with apply(model, SkipPlan.parse(plan)) as applied:
        applied.vision_mask = vision_mask(family, inputs["input_ids"][0])[None]
        ids, logits = greedy(model, family, [ONE_PICTURE], 3)[0]
    assert_close(family, logits, expected, plan)
    assert ids == expected_ids
