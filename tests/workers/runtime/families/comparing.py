"""Running a model as its users do, and comparing with a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.runtime import UnsupportedFamilyError, describe

from .catalogue import SUPPRESSED, model_of
from .tiny import Family, Prompt, batch_inputs, forget_positions


def supported(family: Family) -> PreTrainedModel:
    """The family's model; the test is skipped when the runtime may decline the family and does so by a clear error."""
    model = model_of(family.name)
    if family.may_be_unsupported:
        try:
            describe(model)
        except UnsupportedFamilyError as error:
            assert len(str(error)) > 20
            pytest.skip(f"declined: {error}")
    return model


def plain_logits(model: PreTrainedModel, family: Family, prompt: Prompt) -> Tensor:
    """Logits [tokens, vocabulary] of one prompt by the model as it is."""
    forget_positions(model)
    with torch.no_grad():
        return model(**batch_inputs(family, [prompt])).logits[0]


def greedy(
    model: PreTrainedModel, family: Family, prompts: Sequence[Prompt], length: int, **settings: Any
) -> list[tuple[list[int], Tensor]]:
    """Cached greedy generation of a left-padded batch: per prompt the answer and its logits [length, vocabulary]."""
    forget_positions(model)
    output = model.generate(
        **batch_inputs(family, prompts),
        **{
            "do_sample": False,
            "max_new_tokens": length,
            "suppress_tokens": list(SUPPRESSED),
            "return_dict_in_generate": True,
            "output_logits": True,
            **settings,
        },
    )
    logits = torch.stack(output.logits, dim=1)
    return [(output.sequences[row, -length:].tolist(), logits[row]) for row in range(len(prompts))]


def assert_close(family: Family, found: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to the family's tolerance, relative to the largest expected logit."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    assert torch.isfinite(expected).all(), f"{what}: the reference is not finite"
    difference = distance(found, expected)
    assert difference <= family.tolerance, f"{what}: logits differ by {difference:.1e} of their scale"


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite when `found` has a NaN.

    Ids that a model rules out itself carry the smallest number of their type (chameleon): they only have to agree.
    """
    ruled_out = expected < -1e30
    if not torch.isfinite(found).all() or not torch.equal(ruled_out, found < -1e30):
        return float("inf")
    scale = expected.masked_fill(ruled_out, 0).abs().max()
    return float((found - expected).masked_fill(ruled_out, 0).abs().max() / scale)
