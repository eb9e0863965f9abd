"""Putting plans on a live model and taking them off: order, leftovers, refusals. References are in families/."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from families.tiny import CACHE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from workers.runtime import (
    Action,
    PlanError,
    SkipPlan,
    UnsupportedFamilyError,
    apply,
    apply_permanently,
    describe,
    validate,
)
from workers.runtime.edits import Edits
from workers.runtime.families import APPLIED

LAYERS, IMAGE, VOCABULARY = 6, 99, 100
VISION = 4


def build_model(attention: str = "sdpa", **text: object) -> LlavaForConditionalGeneration:
    text_config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.3,
            "eos_token_id": None,
            "pad_token_id": 0,
            **text,
        }
    )
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=text_config, vision_config=tower, image_token_index=IMAGE)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    return model.eval()


MODEL = build_model()


def prompt(before: int = 3, after: int = 4, images: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 90, (before + after,), generator=generator).tolist()
    ids = torch.tensor([[*words[:before], *([IMAGE] * VISION * images), *words[before:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
    return inputs


def logits(model: nn.Module, **changes: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**{**prompt(), **changes}).logits


def random_plan(generator: random.Random) -> SkipPlan:
    text = "".join(generator.choice("RFBS") for _ in range(LAYERS))
    return SkipPlan.parse(text if set(text) != {"S"} else "R" * LAYERS)


# Leaving nothing behind ---------------------------------------------------------------------------------------------


def test_three_hundred_random_cycles_restore_every_bit_and_keep_nothing() -> None:
    generator = random.Random(0)
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    configuration, expected = str(MODEL.config), logits(MODEL)
    for _ in range(50):  # whatever is made once is made now
        with apply(MODEL, random_plan(generator)):
            logits(MODEL)
    gc.collect()
    objects = len(gc.get_objects())
    for cycle in range(300):
        with apply(MODEL, random_plan(generator)):
            if cycle % 20 == 0:
                logits(MODEL)
    gc.collect()
    assert len(gc.get_objects()) - objects < 150  # fewer than one per two cycles
    after = MODEL.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert str(MODEL.config) == configuration
    assert torch.equal(logits(MODEL), expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text("RFBS", min_size=LAYERS, max_size=LAYERS), st.booleans()), max_size=5))
def test_any_order_of_installing_and_removing(steps: list[tuple[str, bool]]) -> None:
    """One plan at a time: a second one is refused and changes nothing, and removing twice is removing once."""
    expected = logits(MODEL)
    handles = []
    installed = None
    for text, early in steps:
        plan = SkipPlan.parse(text)
        if not plan.kept:
            continue
        if installed is not None and not plan.is_dense:
            with pytest.raises(PlanError, match=installed.plan.text):
                apply(MODEL, plan)
        elif installed is None:
            handle = apply(MODEL, plan)
            handle.install()
            handles.append(handle)
            installed = None if plan.is_dense else handle
        if early and installed is not None:
            installed.remove()
            installed.remove()
            installed = None
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(MODEL), expected)
    assert len(MODEL.model.language_model.layers) == MODEL.config.text_config.num_hidden_layers == LAYERS


def test_handles_made_before_a_plan_is_installed_cannot_be_installed_beside_it() -> None:
    first, second = (apply(MODEL, SkipPlan.skipping(LAYERS, [layer])) for layer in (1, 2))
    with first, pytest.raises(PlanError, match="RSRRRR"):
        second.install()
    with second:
        assert len(MODEL.model.language_model.layers) == LAYERS - 1
    assert len(MODEL.model.language_model.layers) == LAYERS


def test_the_all_run_plan_installs_nothing() -> None:
    modules = [dict(module.__dict__) for module in MODEL.modules()]
    with apply(MODEL, SkipPlan.dense(LAYERS)):
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in MODEL.modules())
        assert hooks == sum(len(own["_forward_hooks"]) + len(own["_forward_pre_hooks"]) for own in modules)
        assert all(own.keys() == module.__dict__.keys() for own, module in zip(modules, MODEL.modules(), strict=True))
        with apply(MODEL, SkipPlan.parse("RFRRRS")):  # so another plan may come inside
            logits(MODEL)


def test_hidden_states_first_asked_for_under_a_plan_are_complete_afterwards() -> None:
    """transformers installs its recording hooks on first demand, on the layers that it finds then."""
    model = build_model()
    with torch.no_grad():
        with apply(model, SkipPlan.parse("SRRSRR")):
            assert len(model(**prompt(), output_hidden_states=True).hidden_states) == LAYERS - 2 + 1
        assert len(model(**prompt(), output_hidden_states=True).hidden_states) == LAYERS + 1


def test_a_description_is_that_of_the_whole_model_while_a_plan_is_applied() -> None:
    whole = describe(MODEL)
    with apply(MODEL, SkipPlan.parse("SFRRBS")):
        assert describe(MODEL) == whole
    assert whole.stack_path == "model.language_model.layers" and whole.vision_token_ids == (IMAGE,)


def test_a_permanent_plan_leaves_an_ordinary_model_that_takes_further_plans() -> None:
    model = build_model()
    with apply(model, SkipPlan.parse("SRSRRR")):
        expected = logits(model)
    apply_permanently(model, SkipPlan.parse("SRRRRR"))
    assert describe(model).num_layers == LAYERS - 1
    with apply(model, SkipPlan.parse("RSRRR")):
        assert torch.equal(logits(model), expected)
    apply_permanently(model, SkipPlan.parse("RSRRR"))
    assert torch.equal(logits(model), expected)
    assert model.config.text_config.num_hidden_layers == LAYERS - 2


@pytest.mark.parametrize("text", ["RFRRRR", "RRBRRR", "RSRRRR", "SFRBRR"])
def test_a_model_under_a_plan_is_not_copied(text: str, tmp_path: Path) -> None:
    """A copy would run the original's layers, and keep the plan: it is refused, and works before and after."""
    model = build_model()
    expected = logits(model)
    ways = {
        "deepcopy": lambda: copy.deepcopy(model),
        "deepcopy of the inner model": lambda: copy.deepcopy(model.model),
        "pickle": lambda: pickle.dumps(model),
        "torch.save": lambda: torch.save(model, tmp_path / "model.pt"),
    }
    with apply(model, SkipPlan.parse(text)):
        for name, way in ways.items():
            with pytest.raises(PlanError, match=r"cannot be copied.*leave apply\(\) first"):
                way()
                pytest.fail(name)
        if "F" in text or "B" in text:
            with pytest.raises(PlanError, match="cannot be copied"):
                copy.deepcopy(model.model.language_model.layers)
    clone = copy.deepcopy(model)
    with apply(clone, SkipPlan.parse(text)):
        logits(clone)
    assert torch.equal(logits(clone), expected)
    assert "__reduce_ex__" not in vars(model)
    assert pickle.dumps(build_model())  # one that has run cannot be: transformers' own hooks stand in the way


@pytest.mark.parametrize("text", ["RFRRRR", "SRRSRR"])
def test_a_model_under_a_plan_is_not_saved_as_if_it_were_the_plan(text: str, tmp_path: Path) -> None:
    with apply(MODEL, SkipPlan.parse(text)), pytest.raises(PlanError, match=f"{text}.*save_pruned"):
        MODEL.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_is_not_moved_or_converted_while_layers_are_out_of_it() -> None:
    model = build_model()
    for convert in (model.half, lambda: model.to(torch.bfloat16)):
        with apply(model, SkipPlan.parse("RSRRRR")), pytest.raises(PlanError, match=r"RSRRRR.*moved or converted"):
            convert()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    with apply(model, SkipPlan.parse("RFRBRR")):  # all its layers are there
        model.double()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("text", ["RFRRRR", "BRRRRB", "SFRBRR", "RSRRRR"])
def test_an_interrupt_anywhere_in_a_call_leaves_nothing(text: str) -> None:
    """Ctrl-C raises past torch's hooks: the next call must not take the interrupted one's picture for its own."""
    model, expected = build_model(), logits(MODEL)
    modules = list(model.modules())
    with apply(model, SkipPlan.parse(text)):
        planned, changed = logits(model), logits(model, input_ids=prompt(2, 5)["input_ids"])
        for layer in model.model.language_model.layers:
            for module in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
                handle = module.register_forward_pre_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    logits(model)
                handle.remove()
                assert torch.equal(logits(model, input_ids=prompt(2, 5)["input_ids"]), changed)
        assert torch.equal(logits(model), planned)
    assert torch.equal(logits(model), expected)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["RFRRRR", "SFRBRR", "RSRRSR"])
def test_a_failure_at_any_change_while_a_plan_is_installed_undoes_all(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, settings, original = logits(MODEL), str(MODEL.config), Edits.set_item
    for number in itertools.count():
        left = [number]

        def fail(edits: Edits, *args: object, left: list[int] = left) -> None:
            original(edits, *args)  # type: ignore[arg-type]
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Edits, "set_item", fail)
        try:
            apply(MODEL, SkipPlan.parse(text)).install()
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            monkeypatch.undo()
        assert str(MODEL.config) == settings
        assert torch.equal(logits(MODEL), expected), f"after {number} changes"
    assert number > 5
    MODEL.model.language_model.layers.__dict__[APPLIED].remove()
    assert torch.equal(logits(MODEL), expected)


def test_what_cannot_be_undone_does_not_keep_the_rest_from_it() -> None:
    values = {"a": 1, "b": 2}
    for error in (ValueError("no"), KeyboardInterrupt()):
        edits = Edits()
        edits.set_item(values, "a", 5)
        edits.on_undo(Mock(side_effect=error))
        edits.set_item(values, "b", 6)
        with pytest.raises(type(error)):
            edits.undo()
        assert values == {"a": 1, "b": 2}
        edits.undo()  # nothing is left


def test_an_interrupt_while_leaving_waits_for_another_thread_still_restores() -> None:
    expected, inside, go_on = logits(MODEL), threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    applied = apply(MODEL, SkipPlan.parse("RFRRRR"))
    applied.install()
    handle = MODEL.lm_head.register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(logits, MODEL)
        assert inside.wait(60)
        with (
            patch.object(threading.Condition, "wait", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            applied.remove()
        go_on.set()
        answer.result(60)
    handle.remove()
    assert torch.equal(logits(MODEL), expected)


# Vision tokens ------------------------------------------------------------------------------------------------------


def embedded(model: LlavaForConditionalGeneration) -> tuple[dict[str, Tensor], Tensor]:
    """The prompt as embeddings with the picture's features in place, and where they are."""
    inputs = prompt()
    vision = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(vision[..., None], features)
    return {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}, vision


@pytest.mark.parametrize("text", ["RFRRRR", "BRRRRB", "SFRBRR"])
def test_a_mask_given_by_hand_stands_for_missing_input_ids(text: str) -> None:
    plan = SkipPlan.parse(text)
    with apply(MODEL, plan):
        expected = logits(MODEL)
        answer = MODEL.generate(**prompt(), max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])[:, -4:]
    inputs, vision = embedded(MODEL)
    with torch.no_grad(), apply(MODEL, plan) as applied:
        with pytest.raises(RuntimeError, match="vision_mask"):
            MODEL(**inputs)
        applied.vision_mask = vision
        assert torch.equal(MODEL(**inputs).logits, expected)
        for use_cache in (True, False):
            found = MODEL.generate(
                **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE], use_cache=use_cache
            )
            assert torch.equal(found, answer)
        states = MODEL.model.language_model(**inputs).last_hidden_state  # an inner module
        assert torch.equal(MODEL.lm_head(states), expected)


def test_a_mask_for_another_batch_is_refused() -> None:
    with apply(MODEL, SkipPlan.parse("RFRRRR")) as applied:
        with pytest.raises(ValueError, match="batch, tokens"):
            applied.vision_mask = torch.zeros(3, dtype=torch.bool)
        applied.vision_mask = torch.ones(2, 11, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="2 sequences"):
            logits(MODEL)


def test_placeholder_ids_without_a_picture_are_words() -> None:
    inputs = prompt()
    del inputs["pixel_values"]
    with torch.no_grad():
        expected = MODEL(**inputs).logits
        with apply(MODEL, SkipPlan.parse("RFRRBR")):
            assert torch.equal(MODEL(**inputs).logits, expected)


def test_an_inner_module_does_not_run_a_plan_unknowingly() -> None:
    inputs, _ = embedded(MODEL)
    with apply(MODEL, SkipPlan.parse("RFRRRR")), pytest.raises(RuntimeError, match="vision_mask"):
        MODEL.model.language_model(**inputs)


def test_a_conversation_with_a_second_picture_continues_on_the_cache() -> None:
    first, second = prompt(seed=1), prompt(before=2, seed=2)
    together = {name: torch.cat([first[name], second[name]], dim=int(name != "pixel_values")) for name in first}
    for text in ("RFRRRR", "BRRRRB", "SFRBRR"):
        with torch.no_grad(), apply(MODEL, SkipPlan.parse(text)):
            expected = MODEL(**together).logits[:, first["input_ids"].shape[1] :]
            cache = MODEL(**first, use_cache=True)[CACHE]
            second_turn = {**second, "attention_mask": together["attention_mask"]}
            found = MODEL(**second_turn, **{CACHE: cache}).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Refusals -----------------------------------------------------------------------------------------------------------


def test_attention_without_masks_takes_no_split_plan() -> None:
    model = build_model()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(PlanError, match=r"flash_attention_2.*sdpa"):
        apply(model, SkipPlan.parse("RQRRRR")).install()
    with apply(model, SkipPlan.parse("PSRRRR")):
        assert len(model.model.language_model.layers) == LAYERS - 1


def test_a_text_model_has_no_vision_tokens_to_treat_apart() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=20)
    )
    descriptor = describe(model)
    assert all(
        allowed == {Action.RUN, Action.SKIP, Action.SKIP_ATTENTION, Action.SKIP_MLP} for allowed in descriptor.allowed
    )
    with pytest.raises(PlanError, match=r"layer 1 cannot take F .*placeholder"):
        validate(SkipPlan.parse("RFR"), descriptor)


def test_a_list_of_unknown_meaning_with_one_entry_per_layer_stops_skipping() -> None:
    model = build_model()
    model.config.text_config.head_widths = [8] * LAYERS
    with pytest.raises(PlanError, match="head_widths"):
        apply(model, SkipPlan.parse("SRRRRR"))
    apply(model, SkipPlan.parse("FRRRRR"))


def test_a_loop_that_depends_on_layer_places_stops_skipping() -> None:
    class Odd(type(MODEL.model.language_model)):  # type: ignore[misc]
        def forward(self, inputs_embeds: Tensor, **kwargs: object) -> Tensor:
            hidden_states = inputs_embeds
            for place, layer in enumerate(self.layers):
                if place % 2:
                    hidden_states = layer(hidden_states, **kwargs)
            return hidden_states

    model = build_model()
    model.model.language_model.__class__ = Odd
    assert "i % 2" in describe(model).reason(0, Action.SKIP)
    with pytest.raises(PlanError, match="layer 2 cannot take S"):
        apply(model, SkipPlan.parse("RRSRRR"))


def test_a_loop_that_hands_on_more_than_hidden_states_is_refused() -> None:
    class Chatty(type(MODEL.model.language_model)):  # type: ignore[misc]
        def forward(self, inputs_embeds: Tensor, memory: Tensor, **kwargs: object) -> Tensor:
            hidden_states = inputs_embeds
            for layer in self.layers:
                hidden_states, memory = layer(hidden_states, memory)
            return hidden_states

    model = build_model()
    model.model.language_model.__class__ = Chatty
    for action in (Action.SKIP, Action.FREEZE, Action.BYPASS):
        assert "memory" in describe(model).reason(3, action)


def test_models_without_a_decoder_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match="Linear"):
        describe(nn.Linear(2, 2))
    model = build_model()
    model.model.language_model.layers = nn.ModuleList(list(model.model.language_model.layers)[:-1])
    with pytest.raises(UnsupportedFamilyError, match=r"6 decoder layers.*found 0"):
        describe(model)


# The cache of bypassed layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "text"), list(itertools.product((None, 5), ("BRRRRR", "RRRRRB", "BBBBBB", "SBRFRB"))), ids=str
)
def test_cropping_a_cache_goes_back_exactly(window: int | None, text: str) -> None:
    """Assisted decoding crops: after it the cache must be as if the cropped tokens had never been seen."""
    model = MODEL if window is None else build_mistral(window)
    inputs = prompt()
    more = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), apply(model, SkipPlan.parse(text)):
        cache = model(**inputs, use_cache=True)[CACHE]
        cache.activate_past_recording()
        expected = model(input_ids=more, **{CACHE: cache}).logits
        for tokens in (3, 2, 3):
            cache.crop(-3)
            model(input_ids=torch.full((1, tokens), 9), **{CACHE: cache})
            cache.crop(-tokens)
            found = model(input_ids=more, **{CACHE: cache}).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3


def build_mistral(window: int) -> LlavaForConditionalGeneration:
    from transformers import MistralConfig

    text_config = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.3,
        sliding_window=window,
    )
    config = LlavaConfig(text_config=text_config, vision_config=MODEL.config.vision_config, image_token_index=IMAGE)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


class Renamed(LlavaForConditionalGeneration):
    """A model whose image inputs have a name that nobody told the runtime."""

    def forward(self, input_ids: Tensor, canvas: Tensor | None = None, **kwargs: object) -> object:
        return super().forward(input_ids, pixel_values=canvas, **kwargs)


def test_images_by_an_unknown_name_stop_splitting_rather_than_count_as_text() -> None:
    model = build_model()
    model.__class__ = Renamed
    model.model.__class__ = type("Inner", (type(model.model),), {"forward": lambda self, input_ids, **kwargs: None})
    assert "no image inputs by a name" in describe(model).reason(0, Action.FREEZE)
    with pytest.raises(PlanError, match="layer 1 cannot take B"):
        apply(model, SkipPlan.parse("RBRRRR"))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=8))
def test_edits_are_undone_last_first(steps: list[tuple[str, int]]) -> None:
    values: dict[str, object] = {"a": (first := object()), "b": None}
    edits = Edits()
    for key, value in steps:
        edits.set_item(values, key, value)
    edits.undo()
    assert list(values.items()) == [("a", first), ("b", None)]
    values["a"] = 1
    edits.undo()  # nothing is undone twice
    assert values["a"] == 1
