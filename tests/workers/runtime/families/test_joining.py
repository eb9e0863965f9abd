"""The attention of one layer and the MLP of a later one as one layer, which plain transformers loads and runs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from workers.runtime import Action, PlanError, SkipPlan, apply, describe, save_pruned
from workers.runtime.joining import is_joinable

from .catalogue import ALL, ONE_PICTURE, TEXT_ONLY, by_name, model_of, prompts_of
from .comparing import assert_close, greedy, plain_logits, supported
from .expected import expected_generation, expected_logits
from .test_sublayers import WHOLE, refused
from .test_surgery import reload
from .tiny import CACHE, RELOAD, Family, batch_inputs

LENGTH = 4
PARALLEL = (
    "aya_vision",
    "cohere2_vision",
    "cohere_compass",
    "llava over cohere",
    "llava over gpt_neox",
    "llava over phi",
)
"""The MLP reads the layer's input, not what attention adds to it."""
WEIGHTS_BESIDE = ("gemma4_unified",)
"""A scale of all that the layer returns."""
OTHER_CALL = {"llama4": "DMDMDMDM", "ernie4_5_vl_moe": "DMMDMMM"}
"""Families whose layers call a mixture of experts (M) otherwise than a dense MLP (D): the kinds of their layers."""
OFTEN = (
    "llava",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_5",
    "gemma3",
    "llama4",
    "aya_vision",
    "llava over qwen3_moe",
    "llava over deepseek_v3",
    "llava over granite",
    "llava over opt",
    "gemma4_unified",
)
"""Plain, multimodal positions, deepstack, linear attention, norms behind, mixtures beside MLPs, a parallel block, a
period and a count of mixtures, scaled sums, an MLP without a module, weights beside both parts."""


def joined(layers: int, first: int, last: int) -> str:
    return "R" * first + "M" + "S" * (last - first - 1) + "A" + "R" * (layers - last - 1)


def joinable(family: Family, first: int, last: int) -> bool:
    """Whether the two layers must become one, from what is known of the family."""
    if family.name in (*PARALLEL, *WEIGHTS_BESIDE, *WHOLE):
        return False
    if "M" in refused(family, first) or "A" in refused(family, last):
        return False
    if not all(skippable(family, layer) for layer in range(first, last + 1)):
        return False
    if kinds := OTHER_CALL.get(family.name):
        return kinds[first] == kinds[last]
    return family.possible("R" * first + "R" + "S" * (last - first) + "R" * (family.layers - last - 1))


def skippable(family: Family, layer: int) -> bool:
    if "S" in family.may_refuse.get(layer, ""):
        return Action.SKIP in describe(model_of(family.name)).allowed[layer]
    return "S" not in family.refused.get(layer, "")


def several(family: Family) -> str:
    """Return a plan with as many joins as fit, every other one over a skipped layer."""
    plan, layer, length = "", 0, 1
    while layer < family.layers:
        pairs = [(layer, layer + each) for each in (length, 3 - length) if layer + each < family.layers]
        pair = next((each for each in pairs if joinable(family, *each)), None)
        part = joined(pair[1] - layer + 1, 0, pair[1] - layer) if pair else "R"
        rest = "R" * (family.layers - layer - len(part))
        if not (family.possible(removal(plan + part + rest)) and family.savable(removal(plan + part + rest))):
            part = "R"
        plan, layer, length = plan + part, layer + len(part), 3 - length if len(part) > 1 else length
    return plan


def removal(plan: str) -> str:
    return plan.replace("M", "R").replace("A", "S")


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each.name in OFTEN else pytest.mark.slow, id=each.name) for each in ALL],
    scope="module",
)
def test_a_joined_layer_is_saved_and_reloaded_where_that_is_exact(family: Family, tmp_path: Path) -> None:
    model = supported(family)
    for first, last in combinations(range(family.layers), 2):
        text = joined(family.layers, first, last)
        if last - first < 3 and "A" not in refused(family, last) and "M" not in refused(family, first):
            assert is_joinable(model, SkipPlan.parse(text)) == joinable(family, first, last), text
    plan = several(family)
    if set(plan) == {"R"} or RELOAD in family.traps:
        pytest.skip("no layers can be joined" if set(plan) == {"R"} else family.traps[RELOAD])
    save_pruned(model, SkipPlan.parse(plan), tmp_path / "model")
    found = reload(family, tmp_path / "model")
    pairs = SkipPlan.parse(plan).joins
    layers = found.get_submodule(family.stack).children()
    assert len(list(layers)) == family.layers - sum(last - first for first, last in pairs)
    prompt = prompts_of(family)[0]
    with apply(model, SkipPlan.parse(plan)):
        own = plain_logits(model, family, prompt)
    logits = plain_logits(found, family, prompt)
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-6 * float(own[own.abs() < 1e30].abs().max()))
    assert_close(family, logits, expected_logits(family, plan, prompt), plan)
    ids, logits = greedy(found, family, [prompt], LENGTH)[0]
    expected_ids, expected = expected_generation(family, plan, prompt, LENGTH, guess=ids)
    assert_close(family, logits, expected, f"{plan} {prompt}")
    assert ids == expected_ids


def test_the_kind_of_a_joined_layer_is_that_of_its_attention_and_its_experts_those_of_its_mlp(tmp_path: Path) -> None:
    sliding = by_name("gemma3")
    kinds = model_of("gemma3").config.get_text_config().layer_types
    first = next(layer for layer in range(sliding.layers - 1) if kinds[layer] != kinds[layer + 1])
    save_pruned(model_of("gemma3"), SkipPlan.parse(joined(sliding.layers, first, first + 1)), tmp_path / "gemma3")
    found = reload(sliding, tmp_path / "gemma3").config.get_text_config().layer_types
    assert list(found) == [*kinds[: first + 1], *kinds[first + 2 :]]

    # Of seven layers the first ones are plain MLPs, the others mixtures: the joined one, in the second place, is one.
    mixed = by_name("llava over deepseek_v3")
    dense = model_of(mixed.name).config.get_text_config().first_k_dense_replace
    plan = joined(mixed.layers, dense - 1, dense + 1)
    save_pruned(model_of(mixed.name), SkipPlan.parse(plan), tmp_path / "mixed")
    reloaded = reload(mixed, tmp_path / "mixed")
    assert reloaded.config.get_text_config().first_k_dense_replace == dense - 1
    own, other = (list(each.get_submodule(mixed.stack).children()) for each in (model_of(mixed.name), reloaded))
    assert type(other[dense - 1].mlp) is type(own[dense + 1].mlp) is not type(own[dense - 1].mlp)


def test_it_stores_the_keys_that_the_plan_stores(tmp_path: Path) -> None:
    family, plan = by_name("llava"), "RMSAMAR"
    model = model_of("llava")
    save_pruned(model, SkipPlan.parse(plan), tmp_path / "model")
    found = reload(family, tmp_path / "model")
    inputs = batch_inputs(family, [ONE_PICTURE])
    with torch.no_grad():
        with apply(model, SkipPlan.parse(plan)):
            own = [each.keys for each in model(**inputs)[CACHE].layers]
        keys = [each.keys for each in found(**inputs)[CACHE].layers]
    assert [each is None for each in own] == [False, False, True, False, True, False]  # behind S, in the plan's order
    assert all(map(torch.equal, keys, [each for each in own if each is not None])) and len(keys) == 4


@pytest.mark.parametrize(
    ("name", "plan", "reason"),
    [
        ("aya_vision", "RMARRRRR", "layers 1 and 2 cannot become one, .*does not read what its attention adds"),
        ("llama4", "MARRRRRR", "layers 0 and 1 cannot become one, .*mixture of experts"),
        ("gemma4_unified", "MARRRRRR", "layers 0 and 1 .* layer 0 has weights beside .*: layer_scalar"),
        ("qwen3_vl", "RMARRRR", "layers 1 and 2 .* features are added behind the first 2 layers"),
        ("qwen3_5", "RMSARMSA", "layers 3, 7 cannot all be skipped"),
        ("llava", "RARRMRR", r"layer 1: .* cannot say A \(skip_attention\)"),
        ("llava", "RMRARRR", r"layer 1: .* cannot say M \(skip_mlp\)"),
        ("llava", "RMMARRR", r"layer 1: .* cannot say M \(skip_mlp\)"),
    ],
)
def test_what_would_be_another_layer_is_refused_in_a_line(name: str, plan: str, reason: str, tmp_path: Path) -> None:
    family, model = by_name(name), model_of(name)
    before = plain_logits(model, family, TEXT_ONLY)
    with pytest.raises(PlanError, match=reason) as caught:
        save_pruned(model, SkipPlan.parse(plan), tmp_path / "model")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert torch.equal(plain_logits(model, family, TEXT_ONLY), before)
