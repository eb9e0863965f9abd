"""What a decoder layer's block must be to lose a part, on layers written for it; and a forward written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from workers.runtime import Action, PlanError, SkipPlan, apply, apply_permanently
from workers.runtime.edits import Edits
from workers.runtime.sublayers import NotSeparableError, block_of, leave_out

HIDDEN = 8


class Layer(nn.Module):
    """Two parts, two norms, and a forward that a test gives."""

    def __init__(self, forward: Callable[..., Any], **more: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        for name, module in more.items():
            setattr(self, name, module)
        self.own = forward

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None) -> Any:
        return self.own(self, hidden_states)


def pre_norm(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.self_attn(layer.first(x))
    return x + layer.mlp(layer.second(x))


def sandwich(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.first(layer.self_attn(x))
    return x + 0.5 * layer.second(layer.mlp(x))


def parallel_with_one_norm(layer: Any, x: Tensor) -> Tensor:
    y = layer.first(x)
    return x + layer.self_attn(y) + layer.mlp(y)


def times_a_half(layer: Any, x: Tensor) -> Tensor:
    x = x + 0.5 * layer.self_attn(layer.first(x))
    return x + 0.5 * layer.mlp(layer.second(x))


@pytest.mark.parametrize("forward", [pre_norm, sandwich, parallel_with_one_norm, times_a_half])
def test_parts_say_what_they_add(forward: Any) -> None:
    torch.manual_seed(0)
    layer, x, ends = Layer(forward), torch.randn(2, 3, HIDDEN), []
    block = block_of(layer, HIDDEN)
    for part in (block.attention, block.mlp):
        end = layer.get_submodule(part.end)
        end.register_forward_hook(lambda _, args, output, scale=part.scale: ends.append(scale * output))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x + ends[0] + ends[1])
    # Neither is a share of the other: each is what its own part returned.
    only = Layer(forward)
    only.load_state_dict(layer.state_dict())
    for values in (only.mlp.weight, only.mlp.bias, only.second.bias):
        torch.nn.init.zeros_(values)
    with torch.no_grad():
        torch.testing.assert_close(only(x), x + ends[0])


def times_its_own(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.factor * layer.self_attn(layer.first(x))
    return x + layer.factor * layer.mlp(layer.second(x) if isinstance(layer.second, nn.LayerNorm) else x)


def test_a_layer_that_has_changed_is_examined_again() -> None:
    layer = Layer(times_its_own)
    for factor in (0.5, 0.25, 0.25):
        layer.factor = factor
        assert block_of(layer, HIDDEN).mlp.scale == factor
    layer.second = nn.Dropout()
    assert block_of(layer, HIDDEN).mlp.around == ()
    layer.factor = 0.0
    for _ in range(2):
        with pytest.raises(NotSeparableError, match="does more to what its self_attn returns than to add it"):
            block_of(layer, HIDDEN)


@pytest.mark.parametrize(
    ("forward", "around_attention", "around_mlp"),
    [(pre_norm, ("first",), ("second",)), (sandwich, ("first",), ("second",)), (parallel_with_one_norm, (), ())],
)
def test_norms_that_serve_one_part_alone_are_found(
    forward: Any, around_attention: tuple[str, ...], around_mlp: tuple[str, ...]
) -> None:
    block = block_of(Layer(forward), HIDDEN)
    assert (block.attention.name, block.attention.around) == ("self_attn", around_attention)
    assert (block.mlp.name, block.mlp.around) == ("mlp", around_mlp)


def norms_behind_the_sums(layer: Any, x: Tensor) -> Tensor:
    x = layer.first(x + layer.self_attn(x))
    return layer.second(x + layer.mlp(x))


def residual_behind_the_norm(layer: Any, x: Tensor) -> Tensor:
    x = layer.first(x)
    x = x + layer.self_attn(x)
    return x + layer.mlp(layer.second(x))


def gated(layer: Any, x: Tensor) -> Tensor:
    x = x + torch.tanh(layer.self_attn(layer.first(x)))
    return x + layer.mlp(layer.second(x))


def chained(layer: Any, x: Tensor) -> Tensor:
    return x + layer.mlp(layer.self_attn(x))


def twice(layer: Any, x: Tensor) -> Tensor:
    return pre_norm(layer, pre_norm(layer, x))


def third_part(layer: Any, x: Tensor) -> Tensor:
    return pre_norm(layer, x) + layer.third(x)


def norm_read_by_another(layer: Any, x: Tensor) -> Tensor:
    y = layer.first(x)
    x = x + layer.self_attn(y)
    return x + layer.mlp(layer.second(x) + y)


def unknown_call(layer: Any, x: Tensor) -> Tensor:
    return x + layer.self_attn.project(x) + layer.mlp(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (norms_behind_the_sums, "output is not its input"),
        (residual_behind_the_norm, "output is not its input"),
        (gated, "does more to what its self_attn returns than to add it"),
        (chained, "does more to what its self_attn returns"),
        (twice, "output is not its input|exactly once"),
        (third_part, "output is not its input"),
        (norm_read_by_another, "read what first make"),
        (unknown_call, "does not run over stand-ins .*project"),
    ],
)
def test_other_blocks_are_refused_with_the_reason(forward: Any, reason: str) -> None:
    with pytest.raises(NotSeparableError, match=reason):
        block_of(Layer(forward, third=nn.Linear(HIDDEN, HIDDEN)), HIDDEN)


def test_a_layer_without_one_attention_by_name_is_refused() -> None:
    with pytest.raises(NotSeparableError, match="2 modules that are its attention"):
        block_of(Layer(pre_norm, attn=nn.Linear(HIDDEN, HIDDEN)), HIDDEN)


def test_a_layer_that_is_examined_stays_as_it_is() -> None:
    layer = Layer(pre_norm)
    before = {name: id(module) for name, module in layer.named_modules()}, list(vars(layer)), layer.training
    block_of(layer, HIDDEN)
    assert ({name: id(module) for name, module in layer.named_modules()}, list(vars(layer)), layer.training) == before


class Routed(nn.Linear):
    """An MLP that returns its router's scores, too; the layer tells it from others by its class."""

    def forward(self, states: Tensor) -> Any:
        return super().forward(states), states.sum(-1)


def by_class(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.self_attn(layer.first(x))
    if isinstance(layer.mlp, Routed):
        y, _ = layer.mlp(layer.second(x))
    else:
        y = layer.mlp(layer.second(x))
    return x + y


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("mlp", [Routed, nn.Linear])
def test_a_layer_that_calls_its_mlp_by_its_class_runs_without_it(mlp: type[nn.Linear], permanent: bool) -> None:
    layer = Layer(by_class, mlp=mlp(HIDDEN, HIDDEN))
    states = torch.randn(1, 3, HIDDEN)
    expected = states + layer.self_attn(layer.first(states))
    leave_out(Edits(), layer, block_of(layer, HIDDEN), 0, Action.SKIP_MLP, permanent=permanent)
    torch.testing.assert_close(layer(states), expected, rtol=0, atol=0)
    left = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert left == {"self_attn", "first"} | ({"mlp", "second"} if not permanent else set())


# A forward written by hand ------------------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    rope_theta=100.0,
    pad_token_id=0,
)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


def rotated(states: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2104.09864) of ``[heads, tokens, size]``, halves rotated against each other."""
    tokens, size = states.shape[-2:]
    base = float(CONFIG.rope_parameters["rope_theta"])
    angles = torch.outer(torch.arange(tokens), base ** (-torch.arange(0, size, 2) / size)).double()
    first, second = states.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def by_hand(model: LlamaForCausalLM, plan: str, ids: Tensor) -> Tensor:
    """Logits ``[tokens, vocabulary]`` from the weights alone: none of transformers' code, no cache, no mask of its."""
    weights = dict(model.state_dict())
    heads, shared = CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    size = CONFIG.hidden_size // heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weights[name]

    x = weights["model.embed_tokens.weight"][ids]
    tokens = len(ids)
    future = torch.ones(tokens, tokens).triu(1).bool()
    for layer, letter in enumerate(plan):
        own = f"model.layers.{layer}."
        if letter not in "SA":
            y = norm(x, own + "input_layernorm.weight")
            q, k, v = (
                (y @ weights[f"{own}self_attn.{name}_proj.weight"].T).view(tokens, -1, size).transpose(0, 1)
                for name in "qkv"
            )
            k, v = (each.repeat_interleave(heads // shared, 0) for each in (k, v))
            scores = rotated(q) @ rotated(k).transpose(1, 2) / size**0.5
            seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
            x = x + seen.transpose(0, 1).reshape(tokens, -1) @ weights[own + "self_attn.o_proj.weight"].T
        if letter not in "SM":
            y = norm(x, own + "post_attention_layernorm.weight")
            gate, up = (y @ weights[f"{own}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (nn.functional.silu(gate) * up) @ weights[own + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


PLANS = ("RRRRR", "ARRRR", "RAMAR", "MRSAM", "AAAAA", "MMMMM", "SAMSR")


@pytest.mark.parametrize("plan", PLANS)
def test_logits_and_decoding_are_those_of_a_forward_written_by_hand(llama: LlamaForCausalLM, plan: str) -> None:
    ids = torch.randint(1, 60, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), apply(llama, SkipPlan.parse(plan)):
        found = llama(input_ids=ids[None]).logits[0]
        answer = llama.generate(ids[None], max_new_tokens=6, do_sample=False)[0]
    torch.testing.assert_close(
        found, by_hand(llama, plan, ids), rtol=1e-4, atol=1e-5
    )  # norms and positions are float32
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, by_hand(llama, plan, expected)[-1].argmax()[None]])
    assert answer.tolist() == expected.tolist()


def test_a_model_without_parts_is_not_saved_nor_given_another_plan(llama: LlamaForCausalLM, tmp_path: Any) -> None:
    apply_permanently(llama, SkipPlan.parse("RAMRS"))
    with pytest.raises(PlanError, match="export the plan in format runtime"):
        llama.save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match="RAMRS is applied"):
        apply(llama, SkipPlan.parse("RRRR"))
    names = {name for name, _ in llama.named_parameters()}
    assert not {name for name in names if name.startswith("model.layers.1.self_attn") or "layers.2.mlp" in name}
