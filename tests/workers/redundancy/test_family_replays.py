"""Replays from any layer on give what whole passes give, on every family that may share prefixes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from runtime.families.catalogue import ALL, ONE_PICTURE, TEXT_ONLY, letters, model_of, single
from runtime.families.tiny import Family, batch_inputs, forget_positions

from workers.models.loading import LoadedModel
from workers.redundancy.batches import Batch, token_groups
from workers.redundancy.replay import prefill, prefixes_can_be_shared, record_dense_pass, replay
from workers.runtime import SkipPlan, UnsupportedFamilyError, apply, describe, validate
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


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each.name in BY_DEFAULT else pytest.mark.slow, id=each.name) for each in ALL],
)
def test_replays_equal_whole_passes(family: Family) -> None:
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
