"""What holds for speculation whatever the family: the live model, its arguments, its refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from workers.runtime import GapMap, PlanError, SkipPlan, apply, speculate

LAYERS = 4
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
        # keys and values of the kept layers, for at most prompt and answer: [batch, heads, tokens, size]
        assert 0 < cache <= 2 * 3 * len(PROMPTS) * 2 * (5 + 12) * 8 * 4
    assert state_of(MODEL) == before
    assert [each.data_ptr() for each in MODEL.parameters()] == addresses


def test_drafts_are_those_of_the_model_under_the_plan_and_its_maps() -> None:
    """The first draft is what the plan generates by itself behind the dense model's first token."""
    maps = random_map(1)
    with apply(MODEL, PLAN, maps):
        expected = MODEL.generate(**INPUTS, max_new_tokens=9, do_sample=False).tolist()
    with speculate(MODEL, PLAN, maps, draft_length=8) as speculation:
        drafted: list[Tensor] = []
        drafter: Any = speculation._drafter
        forward = drafter.forward

        def watch(**inputs: Any) -> Any:
            outputs = forward(**inputs)
            drafted.append(outputs.logits[:, -1].argmax(-1))
            return outputs

        drafter.forward = watch
        speculation.generate(**INPUTS, max_new_tokens=10, do_sample=False)
    dense_first = MODEL.generate(**INPUTS, max_new_tokens=1, do_sample=False)[:, -1].tolist()
    # The prefill's own prediction is not used: the drafter goes on behind the dense model's first token.
    assert drafted[0].tolist() == [row[5] for row in expected]
    with apply(MODEL, PLAN, maps):
        behind = torch.cat([PROMPTS, torch.tensor(dense_first)[:, None]], dim=1)
        mask = torch.cat([INPUTS["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        own = MODEL.generate(input_ids=behind, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, -8:]
    assert torch.stack(drafted[1:9], dim=1).tolist() == own.tolist()


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
