"""Treatments of layers that follow vLLM's convention, in plain torch, against the same sums over all rows and masks.

The layers' attention is that of a GPU's backend to the plug-in: it is given all rows as queries.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.engines.vllm_plugin.layers import install
from workers.engines.vllm_plugin.plan import PlanRefusedError, Treatment
from workers.engines.vllm_plugin.rows import Rows
from workers.engines.vllm_plugin.step import Step

HIDDEN, HEADS, SIZE, TOKENS = 16, 2, 8, 9
RUN, FREEZE = Treatment.RUN, Treatment.FREEZE
ASK_NOTHING, TEXT_MLP = Treatment.FREEZE_ATTENTION, Treatment.FREEZE_MLP
NO_ATTENTION, NO_MLP, NOTHING = Treatment.SKIP_ATTENTION, Treatment.SKIP_MLP, Treatment.SKIP


class UnquantizedLinearMethod:
    """Named as vLLM's."""

    def apply(self, layer: Any, states: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(states, layer.weight, bias)


class Projection(nn.Linear):
    num_heads, head_size, quant_method = HEADS, SIZE, UnquantizedLinearMethod()

    def forward(self, states: Tensor) -> Any:
        return super().forward(states), None


class Norm(nn.Module):
    """Adds and normalises in place, as vLLM's kernels do."""

    def forward(self, states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return functional.rms_norm(states, (HIDDEN,))
        residual += states
        states.copy_(functional.rms_norm(residual, (HIDDEN,)))
        return states, residual


class Attention(nn.Module):
    attn_backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN", forward_includes_kv_cache_update=True)
    num_heads, num_kv_heads, head_size, head_size_v = HEADS, HEADS, SIZE, SIZE

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.stored: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.stored = torch.stack([key, value])
        heads = [each.view(len(each), HEADS, SIZE).transpose(0, 1) for each in (query, key, value)]
        return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1).flatten(1)


class SelfAttention(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = Projection(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.attn = Attention(f"{name}.self_attn.attn")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_proj(hidden_states)[0].chunk(3, dim=-1)
        angle = positions.float().view(-1, len(hidden_states)).sum(0)[:, None] / 10
        return self.o_proj(self.attn(query * angle.cos(), key * angle.cos(), value))


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = SelfAttention(name)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.SiLU(), nn.Linear(2 * HIDDEN, HIDDEN))

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


def build(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(f"layers.{number}") for number in range(count)).requires_grad_(False)


def contexts(layers: nn.ModuleList) -> dict[str, Any]:
    return {layer.self_attn.attn.layer_name: layer.self_attn.attn for layer in layers}


def stream(layers: nn.ModuleList, positions: Tensor, hidden_states: Tensor) -> Tensor:
    """The residual stream behind the layers, as vLLM's loop goes."""
    hidden_states, residual = hidden_states.clone(), None
    for layer in layers:
        hidden_states, residual = layer(positions, hidden_states, residual)
    return hidden_states if residual is None else hidden_states + residual


def by_masks(
    layers: nn.ModuleList, plan: tuple[Treatment, ...], positions: Tensor, x: Tensor, vision: Tensor
) -> Tensor:
    """The same, every sum over all rows, and what a treatment leaves out taken back."""
    for layer, treatment in zip(layers, plan, strict=True):
        for part, kept, frozen in (
            (partial(layer.self_attn, positions), treatment.keeps_attention, (FREEZE, ASK_NOTHING)),
            (layer.mlp, treatment.keeps_mlp, (FREEZE, TEXT_MLP)),
        ):
            added = part(functional.rms_norm(x, (HIDDEN,)))
            changes = torch.full_like(vision, kept) & ~(vision if treatment in frozen else torch.zeros_like(vision))
            x = torch.where(changes[:, None], x + added, x)
    return x


@pytest.mark.parametrize(
    "plan",
    [
        (RUN, FREEZE, FREEZE, RUN),
        (FREEZE, RUN, NO_MLP, FREEZE),
        (NO_ATTENTION, FREEZE, RUN, RUN),
        (NO_MLP, NO_ATTENTION, NO_ATTENTION, NO_MLP),
        (NOTHING, RUN, NOTHING, NO_ATTENTION),
        (RUN, NOTHING, FREEZE, NOTHING),
        (ASK_NOTHING, TEXT_MLP, ASK_NOTHING, FREEZE),
        (TEXT_MLP, NO_ATTENTION, ASK_NOTHING, NO_MLP),
        (NOTHING, ASK_NOTHING, NOTHING, TEXT_MLP),
    ],
)
@pytest.mark.parametrize("seen", ["none", "some", "all"])
@pytest.mark.parametrize("axes", [1, 3])
def test_layers_give_what_the_masks_give(plan: tuple[Treatment, ...], seen: str, axes: int):
    draw = torch.Generator().manual_seed(1)
    vision = {"none": torch.zeros(TOKENS), "some": torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0]), "all": torch.ones(TOKENS)}
    mask = vision[seen].bool()
    positions = torch.arange(TOKENS) if axes == 1 else torch.randint(0, 9, (axes, TOKENS), generator=draw)
    states = torch.randn(TOKENS, HIDDEN, generator=draw)
    expected = by_masks(build(4), plan, positions, states, mask)
    layers, step = build(4), Step()
    for frozen in install(layers, plan, contexts(layers), step):
        frozen.take_weights()
    rows = Rows.of(mask, TOKENS, torch.device("cpu"))
    step.rows = rows if len(rows.vision) else None
    torch.testing.assert_close(stream(layers, positions, states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vision", [[0, 1, 1, 0, 0, 1, 1, 1, 0], [1] * TOKENS])
@pytest.mark.parametrize("treatment", [FREEZE, ASK_NOTHING])
def test_a_frozen_layer_stores_keys_and_values_of_all_rows(vision: list[int], treatment: Treatment):
    states, positions = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)), torch.arange(TOKENS)
    plain, layers, step = build(1), build(1), Step()
    install(layers, (treatment,), contexts(layers), step)
    step.rows = Rows.of(torch.tensor(vision).bool(), TOKENS, torch.device("cpu"))
    for one in (plain, layers):
        one[0](positions, states.clone(), None)
    torch.testing.assert_close(layers[0].self_attn.attn.stored, plain[0].self_attn.attn.stored)


def test_attention_that_is_skipped_has_no_cache_and_its_weights_are_read_over():
    layers = build(4)
    cached = contexts(layers)
    install(layers, (RUN, NO_ATTENTION, NO_MLP, NOTHING), cached, Step())
    assert sorted(cached) == ["layers.0.self_attn.attn", "layers.2.self_attn.attn"]
    assert {name.split(".")[0] for name, _ in layers.named_parameters()} == {"0", "1", "2"}
    assert not [name for name, _ in layers.named_parameters() if name.startswith(("1.self_attn", "2.mlp"))]
    weights = iter([("qkv_proj.weight", torch.zeros(1)), ("o_proj.weight", torch.zeros(1))])
    assert layers[1].self_attn.load_weights(weights) == set() and next(weights, None) is None


def test_layers_of_another_kind_are_refused_by_name():
    class Sandwich(Layer):
        def __init__(self) -> None:
            super().__init__("layers.0")
            self.post_feedforward_layernorm = Norm()

    class Gated(Layer):
        def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return hidden_states

    with pytest.raises(PlanRefusedError, match=r"layer 0: skip_mlp is known .* and Sandwich has .*post_feedforward"):
        install(nn.ModuleList([Sandwich()]), (NO_MLP,), {}, Step())
    with pytest.raises(PlanRefusedError, match="layer 0: freeze is not known for Gated, which takes hidden_states"):
        install(nn.ModuleList([Gated("layers.0")]), (FREEZE,), {}, Step())
    with pytest.raises(PlanRefusedError, match="the plan is for 2 layers and vLLM builds 1"):
        install(build(1), (RUN, NO_MLP), {}, Step())


def test_a_step_without_a_mask_of_vision_tokens_is_an_error():
    step = Step()
    device = torch.device("cpu")
    real, dummy = SimpleNamespace(attn_metadata={}, slot_mapping={}), SimpleNamespace(attn_metadata=None)
    missing = partial(pytest.raises, RuntimeError, match="without a mask of vision tokens")
    with missing(), step.running(real, 3, device, embedded=True):
        pass
    with step.running(dummy, 3, device, embedded=True):  # vLLM measures its memory
        assert step.rows is None
    with step.running(real, 3, device, embedded=False):  # token ids: no request of a text-only server has images
        assert step.rows is None
    step.note(torch.tensor([True, False, True]))
    with step.running(real, 3, device, embedded=True):
        assert step.rows is not None and step.rows.vision.tolist() == [0, 2]
    assert step.rows is None
    with missing(), step.running(real, 3, device, embedded=True):  # a mask is for one step
        pass
