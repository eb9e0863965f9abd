"""Maps folded into the weights before gaps: held against explicit maps, and against the plain skip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_apply import LAYERS, build_model, logits, prompt
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from workers.runtime import GapMap, PlanError, SkipPlan, apply, apply_permanently, save_pruned
from workers.runtime.folding import FoldingError
from workers.runtime.gaps import gaps
from workers.runtime.locate import locate

MODEL = build_model()
HIDDEN = 32
PLAN = SkipPlan.parse("SRSSRS")
PARTS = SkipPlan.parse("MASRMA")
"""Without attention or MLP, alone and before a gap; neighbours of both kinds."""


def random_maps(plan: SkipPlan, size: float = 0.3, hidden: int = HIDDEN) -> dict[int, GapMap]:
    generator = torch.Generator().manual_seed(1)
    return {
        gap.layer: GapMap(
            gap.layer,
            gap.end,
            torch.eye(hidden) + size * torch.randn(hidden, hidden, generator=generator) / hidden**0.5,
            part=gap.part,
        )
        for gap in gaps(plan)
    }


class ExplicitMaps:
    """The maps as a person would write them down: the output of a part times T, in the live pruned model."""

    def __init__(self, maps: dict[int, GapMap], parts: list[nn.Module]) -> None:
        self._maps, self._parts, self._handles = maps, parts, []

    def __enter__(self) -> None:
        for layer, own in self._maps.items():

            def hook(module: nn.Module, args: Any, output: Any, own: GapMap = own) -> Any:
                whole = isinstance(output, tuple)
                return (output[0] @ own.matrix, *output[1:]) if whole else output @ own.matrix

            self._handles.append(self._parts[layer].register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def explicit_logits(model: nn.Module, plan: SkipPlan, maps: dict[int, GapMap]) -> Tensor:
    layers = zip(locate(model).layers, plan.text, strict=True)
    parts = [layer.self_attn if letter == "M" else layer.mlp for layer, letter in layers]
    with apply(model, plan), ExplicitMaps(maps, parts):
        return logits(model)


@given(st.text(alphabet="RFBSAMQP", min_size=1, max_size=12))
def test_gaps_are_the_maximal_runs_of_skips_and_what_is_missing_of_the_layer_before(text: str) -> None:
    found = gaps(SkipPlan.parse(text))
    covered = [layer for gap in found for layer in range(gap.layer + 1, gap.end + 1)]
    leading = len(text) - len(text.lstrip("S"))
    assert covered == [layer for layer, letter in enumerate(text) if letter == "S" and layer >= leading]
    assert {layer for layer, letter in enumerate(text) if letter in "AM"} <= {gap.layer for gap in found}
    for gap in found:
        assert text[gap.layer] in "AM" or (text[gap.layer] != "S" and gap.length >= 1)
        assert (gap.part == "attention") == (text[gap.layer] == "M")
        assert gap.end + 1 == len(text) or text[gap.end + 1] != "S"


@pytest.mark.parametrize(("plan", "layers"), [(PLAN, [1, 4]), (PARTS, [0, 1, 4, 5])], ids=str)
def test_folded_maps_give_the_logits_of_explicit_ones(plan: SkipPlan, layers: list[int]) -> None:
    maps = random_maps(plan)
    assert sorted(maps) == layers
    expected = explicit_logits(MODEL, plan, maps)
    with apply(MODEL, plan, maps):
        folded = logits(MODEL)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
    with apply(MODEL, plan):
        assert (logits(MODEL) - folded).abs().max() > 0.1  # the maps do change the model


def test_a_map_is_folded_into_the_projections_bias_too() -> None:
    model = build_model(mlp_bias=True)
    with torch.no_grad():
        for layer in locate(model).layers:
            layer.mlp.down_proj.bias.normal_()
    maps = random_maps(PLAN)
    with apply(model, PLAN, maps):
        folded = logits(model)
    torch.testing.assert_close(folded, explicit_logits(model, PLAN, maps), rtol=1e-4, atol=1e-4)


def test_the_identity_is_the_plain_skip_bitwise() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model().to(dtype)
        identity = {gap.layer: GapMap(gap.layer, gap.end, torch.eye(HIDDEN)) for gap in gaps(PLAN)}
        pixels = prompt()["pixel_values"].to(dtype)
        with apply(model, PLAN):
            plain = logits(model, pixel_values=pixels)
        with apply(model, PLAN, identity):
            assert torch.equal(logits(model, pixel_values=pixels), plain)


def test_a_change_of_the_projection_adds_what_it_is_given_times_the_change() -> None:
    generator = torch.Generator().manual_seed(2)
    layers = [layer.mlp.down_proj for layer in locate(MODEL).layers]
    width = layers[0].in_features
    maps = {
        gap.layer: GapMap(
            gap.layer,
            gap.end,
            torch.randn(width, HIDDEN, generator=generator) / width**0.5,
            scope="projection",
        )
        for gap in gaps(PLAN)
    }
    with apply(MODEL, PLAN):
        plain = logits(MODEL)
        handles = [
            layers[index].register_forward_hook(lambda m, a, out, own=own: out + a[0] @ own.matrix)
            for index, own in maps.items()
        ]
        expected = logits(MODEL)
        for handle in handles:
            handle.remove()
    with apply(MODEL, PLAN, maps):
        folded = logits(MODEL)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
    assert (plain - folded).abs().max() > 0.1
    nothing = {k: replace(own, matrix=torch.zeros(width, HIDDEN)) for k, own in maps.items()}
    with apply(MODEL, PLAN, nothing):
        assert torch.equal(logits(MODEL), plain)


def test_leaving_gives_the_same_weights_back() -> None:
    before = dict(MODEL.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    expected = logits(MODEL)
    with apply(MODEL, PLAN, random_maps(PLAN)):
        assert any(parameter is not before.get(name) for name, parameter in MODEL.named_parameters())
    after = dict(MODEL.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert torch.equal(logits(MODEL), expected)


def test_maps_of_other_gaps_are_refused_and_leave_the_model_as_it_was() -> None:
    expected = logits(MODEL)
    for wrong in ({}, random_maps(SkipPlan.parse("SRSRRS")), random_maps(SkipPlan.parse("RSSSRS"))):
        with pytest.raises(PlanError, match="not those of the gaps of plan SRSSRS"), apply(MODEL, PLAN, wrong):
            pass
    parts = random_maps(PARTS)
    elsewhere = {layer: replace(own, part="mlp") for layer, own in parts.items()}  # an MLP that does not run
    for plan, wrong in ((PARTS, elsewhere), (PARTS, {0: parts[0]}), (SkipPlan.parse("RFSBSR"), parts)):
        with pytest.raises(PlanError, match=f"not those of the gaps of plan {plan.text}"), apply(MODEL, plan, wrong):
            pass
    assert torch.equal(logits(MODEL), expected)


@pytest.mark.parametrize("text", ["RFSBSR", "RQSPSR"])
def test_frozen_layers_hold_maps_too(text: str) -> None:
    plan = SkipPlan.parse(text)
    maps = random_maps(plan)
    expected = explicit_logits(MODEL, plan, maps)
    with apply(MODEL, plan, maps):
        torch.testing.assert_close(logits(MODEL), expected, rtol=1e-4, atol=1e-4)


def test_a_saved_model_has_the_maps_in_its_weights(tmp_path: Path) -> None:
    maps = random_maps(PLAN)
    with apply(MODEL, PLAN, maps):
        expected = logits(MODEL)
    before = logits(MODEL)
    save_pruned(MODEL, PLAN, tmp_path / "saved", compensation=maps)
    assert torch.equal(logits(MODEL), before)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert saved.config.text_config.num_hidden_layers == LAYERS - 4
    assert torch.equal(logits(saved), expected)


def test_a_layer_joined_of_two_has_the_maps_of_both(tmp_path: Path) -> None:
    plan = SkipPlan.parse("RMSARS")
    maps = random_maps(plan)
    assert sorted(maps) == [1, 3, 4]
    with apply(MODEL, plan, maps):
        expected = logits(MODEL)
    save_pruned(MODEL, plan, tmp_path / "saved", compensation=maps)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert saved.config.text_config.num_hidden_layers == 3
    assert torch.equal(logits(saved), expected)


@pytest.mark.parametrize("plan", [PLAN, PARTS], ids=str)
def test_a_permanent_plan_keeps_the_maps(plan: SkipPlan) -> None:
    model, maps = build_model(), random_maps(plan)
    with apply(model, plan, maps):
        expected = logits(model)
    apply_permanently(model, plan, maps)
    assert torch.equal(logits(model), expected)


def test_quantised_and_unknown_projections_are_refused_by_name() -> None:
    class Linear8bit(nn.Linear):
        pass

    model = build_model()
    layer = locate(model).layers[1]
    maps = random_maps(PLAN)
    layer.mlp.down_proj = Linear8bit(48, HIDDEN, bias=False)
    with pytest.raises(FoldingError, match=r"layer 1 .*down_proj is a Linear8bit.*without quantisation"):
        apply(model, PLAN, maps).install()
    layer.mlp.other = layer.mlp.down_proj
    del layer.mlp.down_proj
    with pytest.raises(FoldingError, match="no last projection"):
        apply(model, PLAN, maps).install()


def test_rounding_to_bfloat16_happens_once() -> None:
    model = build_model().to(torch.bfloat16)
    maps = random_maps(PLAN)
    weight = locate(model).layers[1].mlp.down_proj.weight.detach().double()
    with apply(model, PLAN, maps):
        folded = locate(model).layers[0].mlp.down_proj.weight.detach()
    assert torch.equal(folded, (maps[1].matrix.double().T @ weight).to(torch.bfloat16))
