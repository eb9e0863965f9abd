"""One model under one plan, called by several threads: each call as if alone, and the model whole afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from workers.runtime import Action, SkipPlan, apply, describe

from .catalogue import by_name, every_family, model_of, prompts_of
from .comparing import assert_close, greedy, plain_logits
from .expected import expected_generation, expected_logits
from .test_families import plans_for, snapshot, supported
from .tiny import Family, batch_inputs

THREADS, CALLS = 4, 6
SEVERAL = ("llava", "llama4", "gemma3n", "gemma4", "instructblip", "qwen2_vl")
"""Plain; queries scaled; keys shared, per-layer embeddings; the language model called past our forward; positions."""


def in_threads(call: Callable[[int], None]) -> None:
    """Run ``call`` with the numbers 0, 1, ... in threads that begin together; the first error is raised."""
    barrier = threading.Barrier(THREADS)

    def run(thread: int) -> None:
        barrier.wait(60)
        for number in range(CALLS):
            call(thread + number)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(run, thread) for thread in range(THREADS)]:
            done.result(120)


def check_threads(family: Family, plan: str) -> None:
    model = supported(family)
    prompts = prompts_of(family)
    expected = [expected_logits(family, plan, prompt) for prompt in prompts]
    inputs = [batch_inputs(family, [prompt]) for prompt in prompts]
    plain_logits(model, family, prompts[0])
    before = snapshot(model)

    def call(number: int) -> None:
        which = number % len(prompts)
        with torch.no_grad():
            found = model(**inputs[which], use_cache=False).logits[0]
        assert_close(family, found, expected[which], f"{plan} {prompts[which]}")

    with apply(model, SkipPlan.parse(plan)):
        in_threads(call)
    after = snapshot(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


def busy_plan(family: Family) -> str:
    """The mixed plan in which most layers are frozen or bypassed; skips the test where every action is declined."""
    plans = plans_for(family, 12)
    return max(plans, key=lambda plan: sum(letter in "FB" for letter in plan))


@pytest.mark.parametrize("name", SEVERAL)
def test_calls_of_several_threads_are_each_right(name: str) -> None:
    check_threads(by_name(name), busy_plan(by_name(name)))


@pytest.mark.slow
@every_family
def test_calls_of_several_threads_are_each_right_in_every_family(family: Family) -> None:
    check_threads(family, busy_plan(family))


@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_threads_generate_independently(name: str) -> None:
    """Prompts with and without pictures, of different lengths: what one thread says is vision is not so in another."""
    family = by_name(name)
    model, plan, prompts = model_of(name), busy_plan(family), prompts_of(family)
    expected = [expected_generation(family, plan, prompt, 4) for prompt in prompts]

    def call(number: int) -> None:
        which = number % len(prompts)
        ((ids, logits),) = greedy(model, family, [prompts[which]], 4)
        assert_close(family, logits, expected[which][1], f"{plan} {prompts[which]}")
        assert ids == expected[which][0]

    with apply(model, SkipPlan.parse(plan)):
        in_threads(call)


def embedded(family: Family, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """A prompt as embeddings of LLaVA, and where its picture is."""
    model = model_of(family.name)
    inputs = batch_inputs(family, [prompts_of(family)[number]])
    vision = inputs["input_ids"] == next(iter(family.vision_ids))
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(vision[..., None], features)
    return {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}, vision


def test_a_mask_given_by_hand_holds_for_the_thread_that_gives_it() -> None:
    family = by_name("llava")
    model, plan = model_of("llava"), "FRBRFRR"
    cases = [
        (*embedded(family, number), expected_logits(family, plan, prompts_of(family)[number])) for number in (0, 1)
    ]
    with apply(model, SkipPlan.parse(plan)) as applied:

        def call(number: int) -> None:
            inputs, vision, expected = cases[number % 2]
            applied.vision_mask = vision
            with torch.no_grad():
                assert_close(family, model(**inputs, use_cache=False).logits[0], expected, f"case {number % 2}")

        in_threads(call)


def test_a_thread_without_a_mask_is_refused_while_another_has_given_one() -> None:
    family = by_name("llava")
    model, (inputs, vision) = model_of("llava"), embedded(family, 0)
    with apply(model, SkipPlan.parse("FRRRRRR")) as applied, ThreadPoolExecutor(1) as pool, torch.no_grad():
        applied.vision_mask = vision
        for arguments in (inputs, batch_inputs(family, [prompts_of(family)[1]])):
            with pytest.raises(RuntimeError, match="vision_mask was set in another thread"):
                pool.submit(torch.no_grad()(model), **arguments).result(60)
        applied.vision_mask = None
        found = pool.submit(torch.no_grad()(model), **batch_inputs(family, [prompts_of(family)[1]])).result(60)
    assert_close(family, found.logits[0], expected_logits(family, "FRRRRRR", prompts_of(family)[1]), "afterwards")


@pytest.mark.parametrize("plan", ["RFRBRRR", "RSRRSRR"])
def test_a_plan_is_not_taken_off_under_a_call_of_another_thread(plan: str) -> None:
    """Leaving waits: the answer is the plan's to its end, and the model is the dense one after it."""
    family = by_name("llava")
    model, prompt = model_of("llava"), prompts_of(family)[0]
    dense, expected = plain_logits(model, family, prompt), expected_generation(family, plan, prompt, 6)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        with apply(model, SkipPlan.parse(plan)):
            handle = model.lm_head.register_forward_pre_hook(pause)
            answer = pool.submit(greedy, model, family, [prompt], 6)
            assert inside.wait(60)
            threading.Timer(0.3, go_on.set).start()
        assert answer.done() or answer.result(60)
        ((ids, logits),) = answer.result(0)
    handle.remove()
    assert_close(family, logits, expected[1], plan)
    assert ids == expected[0]
    assert torch.equal(plain_logits(model, family, prompt), dense)


def test_two_threads_cannot_put_plans_on_one_model_at_once() -> None:
    """One of them gets its plan, the others an error; whoever has the plan computes it."""
    family = by_name("llava")
    model, prompt = model_of("llava"), prompts_of(family)[0]
    inputs, texts = batch_inputs(family, [prompt]), ["FRRRRRR", "RSRRRRR", "RRBRRRR"]
    expected = {text: expected_logits(family, text, prompt) for text in texts}
    dense, refused = plain_logits(model, family, prompt), []

    def call(number: int) -> None:
        text = texts[number % len(texts)]
        try:
            with apply(model, SkipPlan.parse(text)), torch.no_grad():
                assert_close(family, model(**inputs, use_cache=False).logits[0], expected[text], text)
        except ValueError as error:
            assert "remove it before applying another" in str(error) or "lost layers" in str(error)
            refused.append(text)

    in_threads(call)
    assert len(refused) < THREADS * CALLS
    assert torch.equal(plain_logits(model, family, prompt), dense)
    assert Action.FREEZE in describe(model).allowed[0]
