"""Ways to generate beyond greedy search, each against a reference that runs the whole sequence for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from workers.runtime import SkipPlan, apply

from .catalogue import (
    ONE_PICTURE,
    PICTURE_FIRST,
    SUPPRESSED,
    TWO_PICTURES,
    batch_of,
    by_name,
    end_plans,
    mixed_plans,
    model_of,
)
from .comparing import assert_close, greedy
from .expected import expected_generation, expected_logits, expected_next
from .patch_grids import patch_grid
from .references import reference_logits
from .tiny import CACHE, VIDEO, Family, Prompt, Seeds, batch_inputs, forget_positions, prompt_ids, since

NAMES = ("llava", "qwen2_vl", "gemma3", "idefics3", "paligemma", "qwen3_vl", "aya_vision", "mistral3")
LENGTH = 5
handful = pytest.mark.parametrize("family", [by_name(name) for name in NAMES], ids=str, scope="module")


def plans_of(family: Family) -> list[str]:
    return [*end_plans(family), mixed_plans(family, 1, seed=3)[0]]


def hardest_plans_of(family: Family) -> list[str]:
    """Bypass at both ends, which changes what the cache holds most, and a mixture; for tests that take long."""
    return plans_of(family)[1::2]


def settings(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": LENGTH, "suppress_tokens": list(SUPPRESSED), **changes}


def generate(model: PreTrainedModel, family: Family, prompts: list[Prompt], **changes: Any) -> list[list[int]]:
    forget_positions(model)
    sequences = model.generate(**batch_inputs(family, prompts), **settings(**changes))
    return sequences[:, -LENGTH:].tolist()


def sampled_reference(family: Family, plan: str, prompt: Prompt, seed: int) -> list[int]:
    answer: list[int] = []
    torch.manual_seed(seed)
    for _ in range(LENGTH):
        chances = expected_next(family, plan, prompt, answer).softmax(-1)
        answer.append(int(torch.multinomial(chances[None], 1)))
    return answer


def beam_reference(family: Family, plan: str, prompt: Prompt, width: int) -> list[int]:
    """The best of `width` beams after `LENGTH` tokens: sums of log-probabilities, no end token."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(LENGTH):
        longer = []
        for score, answer in beams:
            step = expected_logits(family, plan, prompt, answer)[-1].log_softmax(-1)
            step[list(SUPPRESSED)] = -torch.inf
            best = step.topk(width)
            longer += [
                (score + gain, [*answer, token])
                for gain, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(longer, reverse=True)[:width]
    return beams[0][1]


@handful
def test_sampling_with_a_seed(family: Family) -> None:
    model = model_of(family.name)
    for plan in plans_of(family):
        expected = sampled_reference(family, plan, ONE_PICTURE, seed=11)
        with apply(model, SkipPlan.parse(plan)):
            torch.manual_seed(11)
            found = generate(model, family, [ONE_PICTURE], do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
        assert found == [expected], plan


@handful
def test_beam_search_over_a_padded_batch(family: Family) -> None:
    model = model_of(family.name)
    # Before 5.18 the beams of a prompt with two pictures are wrong in plain transformers, dense ones too.
    prompts = [ONE_PICTURE, TWO_PICTURES if since("5.18") else PICTURE_FIRST]
    for plan in hardest_plans_of(family):
        expected = [beam_reference(family, plan, prompt, 3) for prompt in prompts]
        with apply(model, SkipPlan.parse(plan)):
            found = generate(model, family, prompts, num_beams=3, do_sample=False)
        assert found == expected, plan


@handful
def test_several_answers_per_prompt(family: Family) -> None:
    """Expanding a batch repeats prompts that share pictures; greedy beams of one prompt must stay in order."""
    model = model_of(family.name)
    plan = mixed_plans(family, 1, seed=4)[0]
    expected = [sampled_reference(family, plan, ONE_PICTURE, seed=3)]
    with apply(model, SkipPlan.parse(plan)):
        forget_positions(model)
        torch.manual_seed(3)
        alone = generate(model, family, [ONE_PICTURE], do_sample=True, top_k=0, num_return_sequences=1)
        torch.manual_seed(3)
        together = generate(model, family, [ONE_PICTURE], do_sample=True, top_k=0, num_return_sequences=3)
    assert alone == expected
    assert len(together) == 3
    for answer in together:  # every sampled id has a finite probability under the reference of its own prefix
        logits = expected_logits(family, plan, ONE_PICTURE, answer[:-1])[-LENGTH:]
        assert torch.isfinite(logits).all()


@handful
def test_a_static_cache(family: Family) -> None:
    if family.name == "gemma3" and not since("5.17"):
        pytest.skip("transformers itself makes no mask for it, with or without a plan")
    model = model_of(family.name)
    for plan in ["R" * family.layers, *hardest_plans_of(family)]:
        for prompts in ([ONE_PICTURE], batch_of(family)):
            with apply(model, SkipPlan.parse(plan)):
                found = greedy(model, family, prompts, LENGTH, cache_implementation="static")
            check_against_reference(family, plan, prompts, found)


def check_against_reference(family: Family, plan: str, prompts: list[Prompt], found: list[Any]) -> None:
    for prompt, (ids, logits) in zip(prompts, found, strict=True):
        expected_ids, expected = expected_generation(family, plan, prompt, LENGTH, guess=ids)
        assert_close(family, logits, expected, f"{plan} {prompt}")
        assert ids == expected_ids


@handful
def test_generation_without_a_cache(family: Family) -> None:
    model = model_of(family.name)
    for plan in plans_of(family):
        expected_ids, _ = expected_generation(family, plan, ONE_PICTURE, LENGTH)
        with apply(model, SkipPlan.parse(plan)):
            assert generate(model, family, [ONE_PICTURE], do_sample=False, use_cache=False) == [expected_ids], plan


@pytest.mark.parametrize("family", [by_name(name) for name in ("llava", "idefics3", "mistral3")], ids=str)
def test_prompt_lookup_decoding_which_crops_the_cache(family: Family) -> None:
    model = model_of(family.name)
    prompt = Prompt((3, 0, 5), seed=1)
    for plan in ["R" * family.layers, *plans_of(family)]:
        expected_ids, _ = expected_generation(family, plan, prompt, LENGTH)
        with apply(model, SkipPlan.parse(plan)):
            found = generate(model, family, [prompt], do_sample=False, prompt_lookup_num_tokens=3)
        assert found == [expected_ids], plan


@pytest.mark.parametrize("family", [by_name(name) for name in ("llava", "idefics3", "mistral3")], ids=str)
def test_a_second_turn_continues_the_cache_of_the_first(family: Family) -> None:
    model = model_of(family.name)
    for plan in ["R" * family.layers, *plans_of(family)]:
        first, _ = expected_generation(family, plan, ONE_PICTURE, LENGTH)
        question = [30, 41, 52]
        second: list[int] = []
        for _ in range(LENGTH):
            second.append(int(expected_next(family, plan, ONE_PICTURE, [*first, *question, *second]).argmax()))
        with apply(model, SkipPlan.parse(plan)):
            inputs = batch_inputs(family, [ONE_PICTURE])
            output = model.generate(**inputs, **settings(do_sample=False, return_dict_in_generate=True))
            assert output.sequences[0, -LENGTH:].tolist() == first, plan
            longer = torch.cat([output.sequences, torch.tensor([question])], dim=1)
            found = model.generate(
                input_ids=longer,
                attention_mask=torch.ones_like(longer),
                **{CACHE: output[CACHE]},
                **settings(do_sample=False),
            )
        assert found[0, -LENGTH:].tolist() == second, plan


@handful
def test_a_batch_padded_on_the_right(family: Family) -> None:
    """As in training: logits of every prompt's own rows."""
    model = model_of(family.name)
    prompts = [ONE_PICTURE, TWO_PICTURES]
    inputs = batch_inputs(family, prompts)
    short = len(prompt_ids(family, ONE_PICTURE))
    for name, value in inputs.items():
        if value.dim() == 2 and value.shape == inputs["input_ids"].shape:
            padding = value.shape[1] - short
            inputs[name] = torch.stack([value[0].roll(-padding), value[1]])
    for plan in plans_of(family):
        forget_positions(model)
        with torch.no_grad(), apply(model, SkipPlan.parse(plan)):
            found = model(**inputs).logits
        for row, prompt in enumerate(prompts):
            expected = expected_logits(family, plan, prompt)
            assert_close(family, found[row, : len(expected)], expected, f"{plan} {prompt}")


@handful
def test_prompts_that_end_with_a_picture_or_are_nothing_else(family: Family) -> None:
    """The first answer token then comes from a vision row, and a bypassed layer may hold no key at all."""
    model = model_of(family.name)
    for prompts in ([Prompt((3, 0), seed=7)], [Prompt((0,), seed=8)], [Prompt((0,), seed=8), ONE_PICTURE]):
        for plan in hardest_plans_of(family):
            with apply(model, SkipPlan.parse(plan)):
                found = greedy(model, family, prompts, LENGTH)
            check_against_reference(family, plan, prompts, found)


@handful
def test_a_prompt_without_an_attention_mask(family: Family) -> None:
    model = model_of(family.name)
    inputs = {key: value for key, value in batch_inputs(family, [ONE_PICTURE]).items() if key != "attention_mask"}
    for plan in plans_of(family):
        forget_positions(model)
        with torch.no_grad(), apply(model, SkipPlan.parse(plan)):
            found = model(**inputs).logits[0]
        assert_close(family, found, expected_logits(family, plan, ONE_PICTURE), plan)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_video_tokens_are_vision_tokens(name: str) -> None:
    """A video of two frames in the place of a picture; Qwen 3 writes its frames one by one between timestamps."""
    placeholder = FRAME_BY_FRAME if name.startswith("qwen3") else ONE_BLOCK
    family = replace(by_name(name), picture=video_grid, placeholder=placeholder)
    model, eager = model_of(name), model_of(name, "eager")
    prompt = Prompt((3, 0, 4), seed=9)
    for plan in plans_of(family):
        expected = reference_logits(eager, family, plan, prompt)
        forget_positions(model)
        with torch.no_grad(), apply(model, SkipPlan.parse(plan)):
            found = model(**batch_inputs(family, [prompt])).logits[0]
            forget_positions(model)
            answer, logits = greedy(model, family, [prompt], 3)[0]
        assert_close(family, found, expected, plan)
        for step in range(3):
            again = reference_logits(eager, family, plan, prompt, answer[:step])[-1]
            assert_close(family, logits[step], again, f"{plan} step {step}")


ONE_BLOCK = (91, *(VIDEO,) * 12, 92)
FRAME_BY_FRAME = (91, *(VIDEO,) * 6, 92, 91, *(VIDEO,) * 6, 92)


def video_grid(seeds: Seeds) -> dict[str, torch.Tensor]:
    """Two frames of 4 x 6 patches: what `patch_grid` is for a picture."""
    inputs = patch_grid([[seed, seed + 1] for row in seeds for seed in row])
    return {
        "pixel_values_videos": inputs["pixel_values"],
        "video_grid_thw": torch.tensor([[2, 4, 6]] * (len(inputs["image_grid_thw"]) // 2)),
    }


def test_frozen_plans_are_never_silently_wrong_without_input_ids() -> None:
    """Embeddings alone do not say which rows are vision: the right logits or an error, nothing between."""
    family = by_name("llava")
    model = model_of("llava")
    inputs = batch_inputs(family, [ONE_PICTURE])
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        mask = (inputs["input_ids"] == 90)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(mask, torch.cat(list(features)))
    for plan in ("RSRSRRR", "RFRRRRR", "RRBRRRR"):
        expected = expected_logits(family, plan, ONE_PICTURE)
        with torch.no_grad(), apply(model, SkipPlan.parse(plan)):
            if "S" in plan:
                found = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits[0]
                assert_close(family, found, expected, plan)
            else:
                with pytest.raises((ValueError, RuntimeError), match="vision"):
                    model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
