"""Packed questions about one picture against one forward call for each, on tiny models of several families."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.evaluation.shared.draft import Draft
from workers.evaluation.shared.packing import Packer, make_rows
from workers.evaluation.shared.prompts import shared_prompts
from workers.evaluation.shared.state_cache import StateCache
from workers.evaluation.shared.walk import Walker
from workers.layerwise.decoder import Decoder, NotExactError
from workers.layerwise.trie import build_trie
from workers.runtime import SkipPlan, apply

from .catalogue import by_name, mixed_plans, single
from .comparing import distance, supported
from .test_sublayers import plan_of
from .tiny import Family, Prompt, batch_inputs, build, forget_positions, prompt_ids

EXACT = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "internvl", "mistral3")
DECLINED = {
    "qwen3_vl": "is given",
    "gemma3n": "hand each other more",
    "llama4": "scale queries|kind chunked_attention",
    "mllama": "cannot be given some rows",
    "qwen3_5": "cannot be given some rows",
    "paligemma": "do not see exactly what is before them",
}
QUESTIONS = ((21, 22, 23), (21, 22, 30, 31, 32), (40,), (21, 50))
ANSWERS = ((60, 61), (62,), (63, 64, 65), (60, 66))


def asked(family: Family, question: tuple[int, ...], answer: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """One prompt: two words, the picture, a word, a question, and answer tokens."""
    inputs = batch_inputs(family, [Prompt((2, 0, 1), seed=1)], [[*question, *answer]])
    if family.per_token is not None:  # what comes behind the picture is part of the prompt here, not generated
        ids = inputs["input_ids"][0]
        inputs |= {name: value[None] for name, value in family.per_token(ids, len(ids)).items()}
    return inputs


@pytest.mark.parametrize("name", EXACT)
def test_packed_questions_give_the_logits_of_each_alone(name: str) -> None:
    family = by_name(name)
    model = build(family)
    decoder = Decoder(model)
    forget_positions(model)
    prompts = [[*prompt_ids(family, Prompt((2, 0, 1), seed=1)).tolist(), *question] for question in QUESTIONS]
    partial = [
        *(single(family, family.layers - 1, letter) for letter in "AMQP"),
        plan_of(family, 9),
        plan_of(family, 8),
    ]
    plans = [SkipPlan.dense(family.layers), *map(SkipPlan.parse, [*mixed_plans(family, 4, seed=9), *partial])]
    with torch.inference_mode():
        image = shared_prompts(decoder, asked(family, QUESTIONS[0]), prompts, tuple(range(len(prompts))))
        rows = make_rows([image], lambda sample: (Draft(ANSWERS[sample], 8),))
        chunk = Packer(decoder, torch.device("cpu")).chunk(("one",), rows)
        found = {
            plan: decoder.logits(states)
            for node, states in Walker(decoder, StateCache(1 << 30)).ends(build_trie(plans), chunk)
            for plan in node.plans
        }
    for plan in plans:
        for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
            answer = ANSWERS[branch.sample]
            forget_positions(model)
            with torch.inference_mode(), apply(model, plan):
                expected = model(**asked(family, QUESTIONS[branch.sample], answer)).logits[0, -len(answer) - 1 :]
            difference = distance(found[plan.text][first:last], expected.float())
            assert difference <= 5 * family.tolerance, f"{name} {plan}: logits differ by {difference:.1e}"


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_exact_is_declined(name: str) -> None:
    family = by_name(name)
    supported(family)
    model = build(family)
    forget_positions(model)
    prompts = [[*prompt_ids(family, Prompt((2, 0, 1), seed=1)).tolist(), *question] for question in QUESTIONS]
    with pytest.raises(NotExactError, match=DECLINED[name]), torch.inference_mode():
        shared_prompts(Decoder(model), asked(family, QUESTIONS[0]), prompts, tuple(range(len(prompts))))
