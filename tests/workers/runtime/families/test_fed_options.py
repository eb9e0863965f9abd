"""Log-likelihoods of options on tiny models of all families: fed through generation, and packed behind one picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.evaluation.shared.draft import Draft
from workers.evaluation.shared.packing import Packer, make_rows
from workers.evaluation.shared.prompts import shared_prompts
from workers.evaluation.shared.scoring import OptionLikelihoods
from workers.evaluation.shared.state_cache import StateCache
from workers.evaluation.shared.walk import Walker
from workers.layerwise.decoder import Decoder
from workers.layerwise.trie import build_trie
from workers.models.multiple_choice import Choice, Likelihood, feed
from workers.runtime import SkipPlan, apply

from .catalogue import FAMILIES, batch_of, by_name, mixed_plans, model_of
from .expected import expected_logits
from .test_packed_questions import EXACT, QUESTIONS, asked
from .tiny import BATCH, PAD, Family, Prompt, batch_inputs, build, forget_positions, prompt_ids

OPTIONS = ((60, 61), (60,), (63, 64, 65), (60, 66))


def by_hand(logits: Tensor, option: tuple[int, ...]) -> float:
    """Sum of an option's log-probabilities, ``logits`` ``[tokens, vocabulary]`` being of its positions."""
    chances = logits.double().softmax(-1)
    return float(sum(chances[step, token].log() for step, token in enumerate(option)))


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.may_be_unsupported], ids=str, scope="module")
def test_options_fed_in_a_batch_are_as_likely_as_alone(family: Family) -> None:
    prompts = batch_of(family)[: 1 if BATCH in family.traps else 2]
    model = model_of(family.name)
    for plan in ("R" * family.layers, mixed_plans(family, 1, seed=11)[0]):
        forget_positions(model)
        rows = [(prompt, option) for prompt in prompts for option in OPTIONS[:3]]
        with torch.inference_mode(), apply(model, SkipPlan.parse(plan)):
            found = feed(model, batch_inputs(family, [prompt for prompt, _ in rows]), [own for _, own in rows], PAD)
        for (prompt, option), likelihood in zip(rows, found, strict=True):
            expected = by_hand(expected_logits(family, plan, prompt, list(option[:-1]))[-len(option) :], option)
            assert likelihood.total == pytest.approx(expected, rel=1e-4, abs=1e-3), plan


@pytest.mark.parametrize("name", EXACT)
def test_packed_options_are_as_likely_as_alone(name: str) -> None:
    family = by_name(name)
    model = build(family)
    decoder = Decoder(model)
    forget_positions(model)
    prompts = [[*prompt_ids(family, Prompt((2, 0, 1), seed=1)).tolist(), *question] for question in QUESTIONS]
    plans = [SkipPlan.dense(family.layers), *map(SkipPlan.parse, mixed_plans(family, 4, seed=9))]
    with torch.inference_mode():
        image = shared_prompts(decoder, asked(family, QUESTIONS[0]), prompts, tuple(range(len(prompts))))
        rows = make_rows([image], lambda sample: [Draft(option, len(option)) for option in OPTIONS[sample:]])
        chunk = Packer(decoder, torch.device("cpu")).chunk(("one",), rows)
        found = {
            plan: OptionLikelihoods.of(chunk, decoder.logits(states), torch.float32)
            for node, states in Walker(decoder, StateCache(1 << 30)).ends(build_trie(plans), chunk)
            for plan in node.plans
        }
    assert chunk.n_samples == len(QUESTIONS) < len(chunk.samples)
    for plan in plans:
        for sample, question in enumerate(QUESTIONS):
            expected = []
            for option in OPTIONS[sample:]:
                forget_positions(model)
                with torch.inference_mode(), apply(model, plan):
                    logits = model(**asked(family, question, option[:-1])).logits[0, -len(option) :]
                expected.append(by_hand(logits, option))
            likelihoods = found[plan.text].likelihoods[sample]
            assert [each.total for each in likelihoods] == pytest.approx(expected, rel=1e-4, abs=2e-3)
            texts = [str(number) for number in range(len(expected))]
            exact = Choice.of("multiple_choice", texts, [Likelihood(total, 0.0) for total in expected])
            assert Choice.of("multiple_choice", texts, likelihoods).option == exact.option
