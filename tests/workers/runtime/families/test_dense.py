"""The ground that the other tests stand on: builders and references alone, without the code under test."""

from __future__ import annotations

import pytest

from .catalogue import (
    ALL,
    ONE_PICTURE,
    TEXT_ONLY,
    batch_of,
    every_family_at_length,
    letters,
    model_of,
    prompts_of,
    single,
)
from .comparing import assert_close, distance, greedy, plain_logits
from .expected import expected_generation, expected_logits
from .tiny import BATCH, TEXT_BESIDE_PICTURES, Family

LENGTH = 3


@every_family_at_length
def test_the_reference_of_the_all_run_plan_is_the_dense_model(family: Family) -> None:
    dense = model_of(family.name)
    for prompt in prompts_of(family):
        expected = expected_logits(family, "R" * family.layers, prompt)
        assert_close(family, plain_logits(dense, family, prompt), expected, f"{prompt}")


@every_family_at_length
def test_cached_generation_of_the_dense_model_is_the_uncached_reference(family: Family) -> None:
    dense = model_of(family.name)
    prompts = batch_of(family)
    runs = [[prompt] for prompt in prompts] if BATCH in family.traps else [prompts]
    found = [answer for run in runs for answer in greedy(dense, family, run, LENGTH)]
    for prompt, (ids, logits) in zip(prompts, found, strict=True):
        expected_ids, expected = expected_generation(family, "R" * family.layers, prompt, LENGTH, guess=ids)
        assert_close(family, logits, expected, f"{prompt}")
        assert ids == expected_ids


@every_family_at_length
def test_every_action_at_every_layer_shows(family: Family) -> None:
    """A layer that changes nothing would pass every comparison: all must show far above the tolerance."""
    prompt = ONE_PICTURE if family.multimodal else TEXT_ONLY
    dense = expected_logits(family, "R" * family.layers, prompt)
    for layer in range(family.layers):
        offered = letters(family, layer).replace("R", "")
        for letter in offered if family.vision_ids else offered.replace("F", "").replace("B", ""):
            changed = expected_logits(family, single(family, layer, letter), prompt)
            assert distance(changed, dense) > 20 * family.tolerance, f"{letter} at layer {layer}"


@pytest.mark.parametrize(
    "family", [family for family in ALL if {BATCH, TEXT_BESIDE_PICTURES} & set(family.traps)], ids=str
)
def test_the_documented_traps_are_still_there(family: Family) -> None:
    """Tests make exceptions for these; when the library mends one, the exception has to go."""
    dense = model_of(family.name)
    prompts = prompts_of(family)
    alone = [greedy(dense, family, [prompt], LENGTH)[0][1] for prompt in prompts]
    together = [logits for _, logits in greedy(dense, family, prompts, LENGTH)]
    assert max(distance(found, expected) for found, expected in zip(together, alone, strict=True)) > 1e-3
