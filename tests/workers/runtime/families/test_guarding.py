"""A guard on every family: its features are means of the states that the layer is given, or it refuses."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.runtime.guard import GuardError, watching
from workers.runtime.locate import locate, vision_token_ids

from .catalogue import every_family, prompts_of
from .comparing import supported
from .tiny import Family, Prompt, batch_inputs, decoder_layers, forget_positions, prompt_ids, vision_mask

LAYER = 1
BY_ID = ("mllama", "kosmos-2")
"""An image is no run of tokens, or has no id of its own: what the configuration names is all that a guard can know."""


class _Enough(BaseException):
    """Ends a forward pass."""


def read(model: PreTrainedModel, family: Family, prompt: Prompt) -> Tensor:
    found: list[Tensor] = []

    def keep(rows: Tensor) -> None:
        found.append(rows[0])
        raise _Enough

    forget_positions(model)
    inputs, stack = batch_inputs(family, [prompt]), locate(model)
    watched = watching(stack.layers[LAYER], vision_token_ids(model.config), inputs, keep)
    with torch.no_grad(), suppress(_Enough), watched:
        model(**inputs)
    return found[0]


def expected(model: PreTrainedModel, family: Family, prompt: Prompt) -> Tensor:
    """Token by token, with the family's own word for which of them are vision tokens."""
    states: list[Tensor] = []
    layer = decoder_layers(model, family)[LAYER]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    forget_positions(model)
    with torch.no_grad():
        model(**batch_inputs(family, [prompt]))
    hook.remove()
    ids = prompt_ids(family, prompt)
    seen = vision_mask(family, ids).tolist()
    if family.name in BY_ID:
        seen = torch.isin(ids, torch.tensor(vision_token_ids(model.config))).tolist()
    means = []
    for kind in (False, True):
        rows = [state for state, vision in zip(states[0][0], seen, strict=True) if vision is kind]
        means.append(torch.stack(rows).mean(0) if rows else torch.zeros_like(states[0][0, 0]))
    return torch.cat(means)


@every_family
def test_a_guard_reads_the_states_of_a_prompt_or_refuses(family: Family) -> None:
    model = supported(family)
    for prompt in prompts_of(family):
        try:
            found = read(model, family, prompt)
        except GuardError as error:
            assert "the guard needs one state per token" in str(error)
            pytest.skip(f"declined: {error}")
        own = expected(model, family, prompt)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5 * float(own.abs().max()))
