"""Replays from any layer on give what whole passes give, on every family that may share prefixes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runtime.families.catalogue import ALL, ONE_PICTURE, TEXT_ONLY, letters, model_of, single
from runtime.families.tiny import Family, batch_inputs, forget_positions
from transformers import BatchFeature

from workers.models.fed_answers import append_answers
from workers.models.loading import LoadedModel
from workers.redundancy.answers import answers_change_prompts
from workers.redundancy.batches import Batch, token_groups
from workers.redundancy.replay import AnswerLogitsError, prefill, prefixes_can_be_shared, record_dense_pass, replay
from workers.runtime import SkipPlan, UnsupportedFamilyError, apply, describe, validate
from workers.runtime.descriptor import FamilyDescriptor
from workers.runtime.locate import locate
from workers.runtime.plan import PlanError

BY_DEFAULT = {
    "llava",
    "qwen2_vl",
    "qwen3_vl",
    "gemma3",
    "gemma3n",
    "mllama",
    "paligemma",
    "idefics3",
    "blip-2",
    "llama4",
}

SHARE_KEYS = {"gemma3n", "gemma3n_text", "gemma4", "gemma4_unified", "mistral_large4"}
"""Later layers use keys and values of earlier ones, so these run every intervention from the start."""


PROMPTS_SEE_ANSWERS = {"paligemma"}
"""Attention within the prefix goes both ways, and what follows it without a label counts as prefix."""

ONE_LOGIT = {"blip-2", "instructblip"}
"""The language model is asked for the last token's logits alone."""

families = pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each.name in BY_DEFAULT else pytest.mark.slow, id=each.name) for each in ALL],
)


def measured(family: Family) -> tuple[LoadedModel, FamilyDescriptor, Batch]:
    """A family's model with one prompt, or skip where the runtime declines it."""
    model = model_of(family.name)
    try:
        descriptor = describe(model)
    except UnsupportedFamilyError:
        pytest.skip("the runtime declines the family")
    prompt = ONE_PICTURE if family.multimodal else TEXT_ONLY
    inputs = batch_inputs(family, [prompt])
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    loaded = LoadedModel(model, processor, "", family.name)  # type: ignore[arg-type]
    batch = Batch((SimpleNamespace(id="s"),), inputs, token_groups(inputs, descriptor.vision_token_ids))  # type: ignore[arg-type]
    return loaded, descriptor, batch


def answered(batch: Batch, descriptor: FamilyDescriptor) -> Batch:
    """The same prompt with three tokens of text behind it."""
    text = batch.inputs["input_ids"][batch.groups["text"]][-1:]
    inputs = dict(append_answers(BatchFeature(batch.inputs), [text.repeat(3)], 0))
    return replace(batch, inputs=inputs, groups=token_groups(inputs, descriptor.vision_token_ids, 3), answer_tokens=3)


@families
def test_answers_count_only_where_prompts_do_not_see_them(family: Family) -> None:
    loaded, descriptor, batch = measured(family)
    with torch.inference_mode():
        forget_positions(loaded.model)
        followed = answered(batch, descriptor)
        if family.name in ONE_LOGIT:
            with pytest.raises(AnswerLogitsError, match="gives logits of 1 of the 4 tokens"):
                prefill(loaded, followed)
        else:
            assert answers_change_prompts(loaded, batch, followed) == (family.name in PROMPTS_SEE_ANSWERS)


@pytest.mark.parametrize("behind", [False, True], ids=["prompt", "answer"])
@families
def test_replays_equal_whole_passes(family: Family, behind: bool) -> None:
    loaded, descriptor, batch = measured(family)
    model = loaded.model
    if behind:
        if family.name in ONE_LOGIT | PROMPTS_SEE_ANSWERS:
            pytest.skip("answers are not put behind the prompts of this family")
        batch = answered(batch, descriptor)
    stack = locate(model)
    with torch.inference_mode():
        forget_positions(model)
        with record_dense_pass(stack) as dense:
            dense.logits = prefill(loaded, batch)
        reason, _ = prefixes_can_be_shared(loaded, stack, dense, batch)
        assert not reason or family.name in SHARE_KEYS, f"{family.name}: {reason}"
        for layer in range(family.layers):
            for letter in letters(family, layer).replace("R", ""):
                plan = SkipPlan.parse(single(family, layer, letter))
                try:
                    validate(plan, descriptor)
                except PlanError:
                    continue
                found, _ = replay(loaded, stack, dense, batch, plan, 0 if reason else layer)
                forget_positions(model)
                with apply(model, plan):
                    expected = prefill(loaded, batch)
                assert torch.equal(found, expected), f"{plan.text}: {(found - expected).abs().max():.1e}"
