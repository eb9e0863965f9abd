"""Every action on every family against the independent references: logits, cached generation, restoration, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.runtime import Action, PlanError, SkipPlan, apply, describe

from .catalogue import (
    ALL,
    FAMILIES,
    ONE_PICTURE,
    TEXT_ONLY,
    batch_of,
    every_family,
    every_family_at_length,
    is_held_out,
    letters,
    mixed_plans,
    model_of,
    plans_of,
    prompts_of,
    single,
)
from .comparing import assert_close, distance, greedy, plain_logits, supported
from .expected import expected_generation, expected_logits
from .tiny import BATCH, VIDEO, Family, Prompt

LENGTH = 5


def planned_logits(model: PreTrainedModel, family: Family, plan: str, prompt: Prompt) -> Tensor:
    with apply(model, SkipPlan.parse(plan)):
        return plain_logits(model, family, prompt)


def plans_for(family: Family, count: int | None = None) -> list[str]:
    """Plans over what must be offered, and over what is offered although it may be declined."""
    allowed = describe(supported(family)).allowed
    also = {
        layer: "".join(letter for letter in optional if Action.of(letter) in allowed[layer])
        for layer, optional in family.may_refuse.items()
        if layer < family.layers
    }
    plans = plans_of(family, also) if count is None else mixed_plans(family, count, seed=2, also=also)
    if not plans:
        pytest.skip("every action is declined, as it may be")
    return plans


def check_generation(family: Family, plan: str, prompts: list[Prompt], attention: str | None = None) -> None:
    """Cached generation, all prompts in one left-padded batch, against every prompt alone and uncached."""
    supported(family)
    model = model_of(family.name, attention)
    runs = [[prompt] for prompt in prompts] if BATCH in family.traps else [prompts]
    with apply(model, SkipPlan.parse(plan)):
        found = [answer for run in runs for answer in greedy(model, family, run, LENGTH)]
    for prompt, (ids, logits) in zip(prompts, found, strict=True):
        expected_ids, expected = expected_generation(family, plan, prompt, LENGTH, guess=ids)
        assert_close(family, logits, expected, f"{plan} {prompt}")
        assert ids == expected_ids, f"{plan} {prompt}"


@every_family
def test_the_descriptor_finds_the_stack_and_the_vision_tokens(family: Family) -> None:
    descriptor = describe(supported(family))
    assert descriptor.num_layers == family.layers
    assert descriptor.stack_path == family.stack
    found = set(descriptor.vision_token_ids)
    if all(family.may_refuse.get(layer) == "FB" for layer in range(family.layers)) and not found:
        return  # no placeholder known and so nothing to freeze: the refusals are checked elsewhere
    assert family.vision_ids <= found
    assert found - family.vision_ids <= {VIDEO}


@every_family
def test_exactly_the_expected_actions_are_refused(family: Family) -> None:
    model = supported(family)
    descriptor = describe(model)
    for layer in range(family.layers):
        found = set("RFBS") - {action.letter for action in descriptor.allowed[layer]}
        must = set(family.refused.get(layer, ""))
        assert must <= found <= must | set(family.may_refuse.get(layer, "")), f"layer {layer}"
        for letter in found:
            reason = descriptor.reason(layer, Action.of(letter))
            assert reason
            with pytest.raises(PlanError) as caught, apply(model, SkipPlan.parse(single(family, layer, letter))):
                pass
            assert f"layer {layer} " in f"{caught.value} " and reason in str(caught.value)


@every_family_at_length
def test_every_action_at_every_single_layer(family: Family) -> None:
    model = supported(family)
    allowed = describe(model).allowed
    prompt = ONE_PICTURE if family.multimodal else TEXT_ONLY
    for layer in range(family.layers):
        for action in allowed[layer]:
            plan = single(family, layer, action.letter)
            if family.possible(plan) and not action.row.leaves_out:
                expected = expected_logits(family, plan, prompt)
                assert_close(family, planned_logits(model, family, plan, prompt), expected, plan)


@every_family
def test_mixed_plans(family: Family) -> None:
    model = supported(family)
    for plan in plans_for(family):
        for prompt in prompts_of(family):
            expected = expected_logits(family, plan, prompt)
            assert_close(family, planned_logits(model, family, plan, prompt), expected, f"{plan} {prompt}")


@every_family
def test_cached_generation_of_a_padded_batch(family: Family) -> None:
    for plan in plans_for(family)[-1 if is_held_out(family) else -3 :]:
        check_generation(family, plan, batch_of(family))


@pytest.mark.parametrize("family", FAMILIES, ids=str, scope="module")
def test_cached_generation_of_one_prompt_with_eager_attention(family: Family) -> None:
    for prompt in prompts_of(family)[-2:]:
        check_generation(family, mixed_plans(family, 1, seed=1)[0], [prompt], attention="eager")


@pytest.mark.slow
@every_family
def test_many_mixed_plans(family: Family) -> None:
    model = supported(family)
    for number, plan in enumerate(plans_for(family, 24)):
        prompts = prompts_of(family)
        prompt = prompts[number % len(prompts)]
        expected = expected_logits(family, plan, prompt)
        assert_close(family, planned_logits(model, family, plan, prompt), expected, f"{plan} {prompt}")
        check_generation(family, plan, batch_of(family))


@every_family
def test_the_all_run_plan_changes_no_bit(family: Family) -> None:
    model = supported(family)
    for prompt in prompts_of(family):
        before = plain_logits(model, family, prompt)
        assert torch.equal(planned_logits(model, family, "R" * family.layers, prompt), before)


def snapshot(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[str], list[str], str]:
    """Everything of a model that a plan could leave changed: tensors, modules, attributes, settings."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [f"{name} {id(module)}" for name, module in model.named_modules()]
    return tensors, modules, list(_plain_attributes(model)), str(model.config) + str(model.generation_config)


def _plain_attributes(model: PreTrainedModel) -> Iterator[str]:
    """Plain values kept on modules (layer indices, copies of settings) and what hides methods of the class."""
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            if isinstance(value, (int, float, str, bool, list, tuple)) and key != "rope_deltas":
                yield f"{name}.{key} = {value}"
            elif callable(value) and hasattr(type(module), key):
                yield f"{name}.{key} hides a method"
        yield f"{name}: {len(module._forward_hooks)} {len(module._forward_pre_hooks)} hooks"


@every_family
def test_a_model_is_restored_bitwise(family: Family) -> None:
    model = supported(family)
    prompt = prompts_of(family)[0]
    greedy(model, family, [prompt], 2)  # generation itself leaves settings behind the first time
    before, logits = snapshot(model), plain_logits(model, family, prompt)
    for plan in plans_for(family)[-2:]:
        with apply(model, SkipPlan.parse(plan)):
            changed = plain_logits(model, family, prompt)
            greedy(model, family, [prompt], 2)
        assert family.multimodal is False or distance(changed, logits) > family.tolerance, plan
        after = snapshot(model)
        assert before[0].keys() == after[0].keys()
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0]), plan
        assert before[1:] == after[1:], plan
        assert torch.equal(plain_logits(model, family, prompt), logits), plan


@every_family
def test_a_model_is_restored_after_an_error_inside(family: Family) -> None:
    model = supported(family)
    prompt = prompts_of(family)[0]
    before = plain_logits(model, family, prompt)
    with pytest.raises(KeyError, match="inside"), apply(model, SkipPlan.parse(plans_for(family)[0])):
        raise KeyError("inside")
    assert torch.equal(plain_logits(model, family, prompt), before)


@pytest.mark.parametrize("family", ALL, ids=str, scope="module")
def test_plans_that_leave_too_little_are_refused(family: Family) -> None:
    model = supported(family)
    before = plain_logits(model, family, prompts_of(family)[0])
    for plan in (*family.refused_plans, "S" * family.layers):
        with pytest.raises(PlanError), apply(model, SkipPlan.parse(plan)):
            pass
        assert torch.equal(plain_logits(model, family, prompts_of(family)[0]), before), plan


@every_family
def test_a_plan_of_another_length_is_refused(family: Family) -> None:
    model = supported(family)
    for plan in ("R" * (family.layers - 1), "R" * family.layers + "S"):
        with pytest.raises(PlanError, match=str(family.layers)), apply(model, SkipPlan.parse(plan)):
            pass


@every_family
def test_refused_letters_are_never_in_the_plans_of_these_tests(family: Family) -> None:
    """A guard on the tests themselves: an expected refusal must not leak into the plans that have to work."""
    for plan in [*plans_of(family), *mixed_plans(family, 24, seed=2)]:
        assert all(letter in letters(family, layer) for layer, letter in enumerate(plan))
