"""A guard on a live model: its features, its file, and which model answers a prompt."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import tiny_llava
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from workers.guard.artifact import encode
from workers.guard.fit import fit_gaussian
from workers.runtime import SkipPlan, apply
from workers.runtime import guard as runtime_guard
from workers.runtime.applied import apply_permanently
from workers.runtime.guard import Guard, Guarded, GuardError

LAYER = 1


class GuardedLlava(Guarded, LlavaForConditionalGeneration):
    """As a runtime export declares it."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_llava.build_processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> LlavaForConditionalGeneration:
    return tiny_llava.build_model(processor)


def ask(processor: Any, *questions: str, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    colours = torch.randint(0, 255, (len(questions), 3)).tolist()
    images = [[Image.new("RGB", (32, 32), tuple(colour))] for colour in colours]
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left"))


def plain_features(model: Any, inputs: dict[str, Any], layer: int) -> Tensor:
    """Means of the states between layers, as transformers hands them out, token by token."""
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states[layer]
    image = model.config.image_token_id
    rows = []
    for row, ids, mask in zip(states, inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        text = [state for state, token, real in zip(row, ids, mask, strict=True) if real and token != image]
        seen = [state for state, token in zip(row, ids, strict=True) if token == image]
        rows.append(torch.cat([sum(text[1:], text[0]) / len(text), sum(seen[1:], seen[0]) / len(seen)]))
    return torch.stack(rows)


QUESTIONS = ["is there a red circle in the image?", "what shape is green?", "is there a triangle?", "is it blue?"] * 25


@pytest.fixture(scope="module")
def guard(model: Any, processor: Any) -> Guard:
    features = plain_features(model, ask(processor, *QUESTIONS), LAYER)
    unset = Guard(
        "ab" * 32, LAYER, **vars(fit_gaussian(features)), threshold=0.0, false_alarms=0.1, fitted_on=20, threshold_on=9
    )
    return replace(unset, threshold=2 * float(unset.score(features).max()))


INSIDE, OUTSIDE = "what shape is green?", "USER USER yes yes yes no no no ASSISTANT triangle triangle"


def test_a_prompt_is_judged_by_its_states_at_the_layer(model: Any, processor: Any, guard: Guard) -> None:
    inputs = ask(processor, INSIDE, OUTSIDE, seed=3)
    expected = guard.score(plain_features(model, inputs, LAYER))
    assert expected[0] < guard.threshold < expected[1]
    assert guard.admits(model, **inputs).tolist() == [True, False]
    for plan in ("RSRRSR", "RFBRSR"):
        with apply(model, SkipPlan.parse(plan)):  # shares the states below
            assert guard.admits(model, **inputs).tolist() == [True, False]
    between = replace(guard, threshold=float(expected.mean()))  # padding is left out: it would move the mean
    alone = [bool(between.admits(model, **ask(processor, question, seed=3))) for question in (INSIDE,)]
    assert alone == [True]


def test_only_the_layers_below_run_for_a_decision(model: Any, processor: Any, guard: Guard) -> None:
    ran: list[int] = []
    layers = model.model.language_model.layers
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, layer in enumerate(layers)
    ]
    guard.admits(model, **ask(processor, INSIDE))
    for hook in hooks:
        hook.remove()
    assert ran == list(range(LAYER))


def test_a_file_gives_the_guard_back(guard: Guard) -> None:
    content = encode(guard)
    read = Guard.read(content)
    assert encode(read) == content and encode(guard) == content
    assert (read.layer, read.threshold, read.floor) == (guard.layer, guard.threshold, guard.floor)
    features = torch.randn(3, len(guard.mean))
    assert torch.equal(read.score(features), guard.score(features))


@pytest.mark.parametrize("damage", ["", "text", "cut", "other"])
def test_a_damaged_file_is_refused(guard: Guard, damage: str) -> None:
    content = encode(guard)
    other = encode(replace(guard, variances=torch.ones(1)))
    damaged = {"": b"", "text": b"no guard at all", "cut": content[: len(content) // 2], "other": other}[damage]
    with pytest.raises(GuardError, match="the guard's file cannot be read"):
        Guard.read(damaged)


def exported(model: Any, plan: str, guard: Guard) -> GuardedLlava:
    own = GuardedLlava(copy.deepcopy(model.config)).eval()
    own.load_state_dict(model.state_dict())
    apply_permanently(own, SkipPlan.parse(plan))
    own.guard = guard
    return own


def generated(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    found: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    return found.tolist()


def test_the_plan_answers_inside_and_the_dense_model_outside(model: Any, processor: Any, guard: Guard) -> None:
    own = exported(tiny_llava.build_model(processor), "RSRRSR", guard)
    inside, outside = ask(processor, INSIDE), ask(processor, OUTSIDE)
    with apply(model, SkipPlan.parse("RSRRSR")):
        assert generated(own, inside) == generated(model, inside) and own.outside == ()
        planned = generated(model, outside)
    with pytest.raises(GuardError, match=r"prompt 0 .* holds no dense model"):
        generated(own, outside)
    dense = tiny_llava.build_model(processor)
    own.attach_dense(dense)
    assert generated(own, outside) == generated(model, outside) != planned
    assert own.outside == (0,)
    both = ask(processor, INSIDE, OUTSIDE)
    assert generated(own, both) == generated(model, both) and own.outside == (1,)
    assert generated(own, inside) and own.outside == ()
    kept = {parameter.data_ptr() for parameter in own.parameters()}
    alone = [name for name, each in dense.named_parameters() if each.data_ptr() not in kept]
    assert alone and all(name.split(".layers.")[1][0] in "14" for name in alone)  # what the plan has not
    assert all(parameter.data_ptr() in kept for parameter in own.parameters())
    own.guard = None
    assert generated(own, outside) == planned


def test_beams_repeat_a_prompt_that_is_judged_once(model: Any, processor: Any, guard: Guard) -> None:
    own = exported(tiny_llava.build_model(processor), "RSRRSR", guard)
    own.generate(**ask(processor, INSIDE, INSIDE), num_beams=2, max_new_tokens=2)
    with pytest.raises(GuardError, match="prompt 1 "):
        own.generate(**ask(processor, INSIDE, OUTSIDE), num_beams=2, max_new_tokens=2)


def test_another_model_is_not_taken_for_the_dense_one(model: Any, processor: Any, guard: Guard) -> None:
    own = exported(model, "RRRRSR", guard)
    other = tiny_llava.build_model(processor, seed=1)
    with pytest.raises(GuardError, match=r"is not the one of this plan: its .* differs"):
        own.attach_dense(other)
    assert own.dense is None


def scaled(name: str, factor: float, model: Any) -> Any:
    with torch.no_grad():
        for path, parameter in model.model.language_model.layers.named_parameters():
            if name in path:
                parameter *= factor
    return model


@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.o_proj", "", "4.mlp.gate_proj"])
def test_a_fine_tune_of_decoder_layers_is_not_taken_for_the_dense_one(
    model: Any, processor: Any, guard: Guard, part: str
) -> None:
    own = exported(model, "RRSRRR", guard)
    with pytest.raises(GuardError, match=r"is not the one of this plan: none of its layers from \d on is layer"):
        own.attach_dense(scaled(part, 1.5, tiny_llava.build_model(processor)))
    assert own.dense is None


def test_kept_layers_may_hold_maps_where_the_dense_model_holds_none(model: Any, processor: Any, guard: Guard) -> None:
    """With drift every kept layer above the first gap holds one."""
    own = scaled("mlp.down_proj", 1.5, exported(tiny_llava.build_model(processor), "RRSRRR", guard))
    own.attach_dense(tiny_llava.build_model(processor))
    assert generated(own, ask(processor, OUTSIDE)) == generated(model, ask(processor, OUTSIDE))


def test_the_dense_model_follows_to_the_device_of_the_plan(
    processor: Any, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, dense = exported(tiny_llava.build_model(processor), "RRSRRR", guard), tiny_llava.build_model(processor)
    own.attach_dense(dense)
    own.to("meta")

    def outside(*_: Any, **__: Any) -> None:
        raise runtime_guard._Stopped

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", outside)
    monkeypatch.setattr(dense, "generate", lambda *_, **__: {each.device.type for each in dense.parameters()})
    assert own.generate(**ask(processor, OUTSIDE)) == {"meta"}


def test_the_guard_of_another_model_is_refused(processor: Any, guard: Guard) -> None:
    larger = tiny_llava.build_model(processor, sizes=tiny_llava.SIZES | {"hidden_size": 64})
    with pytest.raises(
        GuardError, match="the guard is of another model: it was fitted on states of 48 numbers, not 64"
    ):
        guard.admits(larger, **ask(processor, INSIDE))


def test_prompts_without_ids_are_refused(model: Any, processor: Any, guard: Guard) -> None:
    with pytest.raises(GuardError, match="needs input_ids"):
        guard.admits(model, inputs_embeds=torch.zeros(1, 4, 48))


def test_the_checksum_of_a_guard_is_that_of_its_file(guard: Guard) -> None:
    assert hashlib.sha256(encode(guard)).digest() == hashlib.sha256(encode(Guard.read(encode(guard)))).digest()
