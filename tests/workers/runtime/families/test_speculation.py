"""Speculation gives each family's own answers, whatever the drafter proposes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.runtime import SkipPlan, SpeculationStatistics, UnsupportedFamilyError, speculate

from .catalogue import SUPPRESSED, batch_of, every_family, every_family_at_length, mixed_plans, prompts_of
from .comparing import assert_close, supported
from .tiny import Family, batch_inputs, forget_positions, since

NEW_TOKENS = 10
RECURRENT = ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "glm5_next", "minicpmv4_6", "llava over qwen3_next")
"""Families with linear attention, whose state no cache can set back."""
REFUSED = RECURRENT if since("5.20") else (*RECURRENT, "lfm2_vl")
"""Before 5.20 the state of a convolution cannot be set back either."""


def answer(generate: Any, model: Any, inputs: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
    """Ids, and the dense model's logits [batch, tokens, vocabulary] that decided the new ones.

    No token may come twice: tied embeddings of random weights would else make every answer one token repeated.
    """
    forget_positions(model)
    output = generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        no_repeat_ngram_size=1,
        suppress_tokens=list(SUPPRESSED),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences.tolist(), torch.stack(output.logits, dim=1)


def speculated(family: Family, plan: str, inputs: dict[str, Tensor], length: int) -> SpeculationStatistics | None:
    """Compare one batch's answers, and return what was counted; ``None`` where the family is refused."""
    model = supported(family)
    expected_ids, expected = answer(model.generate, model, inputs)
    try:
        with speculate(model, SkipPlan.parse(plan), draft_length=length) as speculation:
            ids, logits = answer(speculation.generate, model, inputs)
    except UnsupportedFamilyError as error:
        assert "cannot be set back" in str(error) and "\n" not in str(error)
        assert family.name in REFUSED, f"{family.name} is refused: {error}"
        return None
    assert family.name not in REFUSED
    assert ids == expected_ids, plan
    assert_close(family, logits, expected, plan)
    return speculation.statistics


@every_family
def test_answers_are_those_of_the_dense_model(family: Family) -> None:
    """A random plan over random weights drafts badly, and rows of a batch differ: most drafts are refused midway."""
    plan = next(iter(mixed_plans(family, 1, only="RS")), "R" * family.layers)
    for prompts in ([prompts_of(family)[0]], batch_of(family)):
        counted = speculated(family, plan, batch_inputs(family, prompts), 3)
        assert counted is None or counted.rounds


@every_family_at_length
def test_a_drafter_that_is_the_dense_model_is_always_right(family: Family) -> None:
    counted = speculated(family, "R" * family.layers, batch_inputs(family, batch_of(family)), 4)
    if counted is None:
        return
    assert counted.accepted == counted.drafted > 0
    assert counted.rounds == 2  # of 9 tokens behind the prefill's: 4 + 1, then 3 + 1
    assert counted.plain_steps == 0
