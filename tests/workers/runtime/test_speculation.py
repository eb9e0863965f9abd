"""What holds for speculation whatever the family: the live model, its arguments, its refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from workers.runtime import GapMap, PlanError, SkipPlan, apply, speculate

LAYERS = 4
CACHE = "cache" if version.parse(transformers.__version__) >= version.parse("5.24") else "past_key_values"
PLAN = SkipPlan.parse("RSRR")


def build(vocabulary: int = 31, seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.35)
    return model


MODEL = build()
PROMPTS = torch.tensor([[0, 0, 5, 9, 3], [7, 11, 2, 8, 4], [0, 1, 1, 22, 30]])
INPUTS = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long()}


def state_of(model: nn.Module) -> str:
    """A hash of every weight's bits, every module's attributes by name, and the configuration."""
    found = hashlib.sha256(repr(model.config).encode())
    for name, module in model.named_modules():
        found.update(f"{name} {type(module)} {sorted(module.__dict__)}".encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def random_map(seed: int = 0) -> dict[int, GapMap]:
    hidden = MODEL.config.hidden_size
    torch.manual_seed(seed)
    return {0: GapMap(0, 1, torch.eye(hidden) + 0.1 * torch.randn(hidden, hidden))}


def test_the_live_model_stays_bitwise_as_it_was_and_its_weights_are_shared() -> None:
    before, addresses = state_of(MODEL), [each.data_ptr() for each in MODEL.parameters()]
    with speculate(MODEL, PLAN, random_map(), draft_length=3) as speculation:
        speculation.generate(**INPUTS, max_new_tokens=12, do_sample=False)
        folded = MODEL.model.layers[0].mlp.down_proj.weight
        cache = speculation.statistics.extra_bytes - folded.numel() * folded.element_size()
        # keys and values of three layers for at most prompt and answer: [batch, heads, tokens, size]
        assert 0 < cache <= 2 * 3 * len(PROMPTS) * 2 * (5 + 12) * 8 * 4
    assert state_of(MODEL) == before
    assert [each.data_ptr() for each in MODEL.parameters()] == addresses


def test_drafts_are_those_of_the_model_under_the_plan_and_its_maps() -> None:
    """Behind a prompt of one token the cache says nothing: the first draft is the plan's own next token."""
    maps = random_map(1)
    first = torch.tensor([[5], [17], [23], [4]])
    second = MODEL.generate(input_ids=first, max_new_tokens=1, do_sample=False)[:, 1:]
    with speculate(MODEL, PLAN, maps, draft_length=1) as speculation:
        seen: list[Tensor] = []
        drafter: Any = speculation._drafter
        drafter.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
        speculation.generate(input_ids=first, max_new_tokens=3, do_sample=False)
    with apply(MODEL, PLAN, maps):
        expected: list[Tensor] = []
        with MODEL.model.layers[0].register_forward_hook(lambda module, inputs, output: expected.append(output)):
            cache = MODEL(input_ids=first, use_cache=True)
            MODEL(input_ids=second, position_ids=torch.ones_like(second), **{CACHE: cache[CACHE]})
    assert len(seen) == 1
    # Layer 0 is the dense one but for the map in its last projection: its cache entry is the dense model's too.
    assert torch.allclose(seen[0], expected[1], atol=1e-5)
    with speculate(MODEL, PLAN, draft_length=1) as plain:
        assert plain._drafter.model.layers[0].mlp.down_proj.weight is MODEL.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize("plan", ["RRRR", "RSRR", "RSSR", "SSSR"])
def test_lengths_that_adapt_change_no_answer(plan: str) -> None:
    """Plain steps, rounds and drafts of every length follow one another."""
    with speculate(MODEL, SkipPlan.parse(plan)) as speculation:
        for count in (1, 2, 3, 60):
            expected = MODEL.generate(**INPUTS, max_new_tokens=count, do_sample=False)
            found = speculation.generate(**INPUTS, max_new_tokens=count, do_sample=False)
            assert found.tolist() == expected.tolist(), count
    counted = speculation.statistics
    assert counted.tokens == len(PROMPTS) * (1 + 2 + 3 + 60)
    assert counted.plain_steps and counted.rounds


def test_an_ended_speculation_and_impossible_plans_are_refused() -> None:
    with speculate(MODEL, PLAN) as speculation:
        pass
    with pytest.raises(PlanError, match="has ended"):
        speculation.generate(**INPUTS)
    with pytest.raises(PlanError, match="at least one token"):
        speculate(MODEL, PLAN, draft_length=0)
    with pytest.raises(PlanError, match="the plan has 3 layers"):
        speculate(MODEL, SkipPlan.parse("RSR"))
    with apply(MODEL, PLAN), pytest.raises(PlanError):
        speculate(MODEL, PLAN)


@pytest.fixture(scope="module")
def drafting() -> Iterator[Any]:
    with speculate(MODEL, PLAN, draft_length=3) as speculation:
        yield speculation


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 2}, "beam"),
        ({"assistant_model": MODEL}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "assisted"),
        ({"use_cache": False}, "use_cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"custom_generate": MODEL.generate}, "custom_generate"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_given_is_refused_in_one_line(drafting: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(PlanError, match=named) as refused:
        drafting.generate(**INPUTS, max_new_tokens=4, do_sample=False, **arguments)
    assert "\n" not in str(refused.value)
