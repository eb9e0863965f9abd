"""Removing layers from a checkpoint: what plain transformers loads must equal the reference of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from workers.runtime import (
    Action,
    PlanError,
    SkipPlan,
    UnsupportedFamilyError,
    apply_permanently,
    describe,
    save_pruned,
)

from .catalogue import (
    FAMILIES,
    batch_of,
    by_name,
    end_plans,
    every_family,
    every_family_at_length,
    is_held_out,
    mixed_plans,
    model_of,
    prompts_of,
)
from .comparing import assert_close, greedy, plain_logits, supported
from .expected import expected_generation, expected_logits
from .tiny import BATCH, PAD, RELOAD, Family, build

LENGTH = 4


def removal_plans(family: Family, count: int = 2) -> list[str]:
    """Plans of R and S over what must be offered, and over what is offered although it may be declined."""
    also = {}
    if any("S" in optional for optional in family.may_refuse.values()):
        try:
            allowed = describe(model_of(family.name)).allowed
        except UnsupportedFamilyError as error:
            assert family.may_be_unsupported, error
            pytest.skip(f"declined: {error}")
        also = {
            layer: "S"
            for layer, optional in family.may_refuse.items()
            if "S" in optional and Action.SKIP in allowed[layer]
        }
    plans = [*end_plans(family, "RS"), *mixed_plans(family, 4 * count, only="RS", also=also)]
    if not plans:
        pytest.skip("skipping is declined at every layer, as it may be")
    return [plan for plan in plans if family.savable(plan)][: 1 if is_held_out(family) else count]


def reload(family: Family, directory: Path) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if family.multimodal else AutoModelForCausalLM
    model, report = auto.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report.get(key), f"{key}: {sorted(report[key])[:5]}"
    return model.eval()


def check_pruned(pruned: PreTrainedModel, family: Family, plan: str) -> None:
    """A model without the skipped layers against the reference that has them: logits and cached generation."""
    kept = tuple(layer for layer, letter in enumerate(plan) if letter != "S")
    assert len(pruned.get_submodule(family.stack)) == len(kept)  # type: ignore[arg-type]
    text_config = pruned.config.get_text_config()
    for name, expected_value in family.saved_lists(kept).items():
        found_value = getattr(text_config, name)
        assert (list(found_value) if isinstance(found_value, tuple) else found_value) == expected_value, name
    for prompt in prompts_of(family):
        expected = expected_logits(family, plan, prompt)
        assert_close(family, plain_logits(pruned, family, prompt), expected, f"{plan} {prompt}")
    prompts = batch_of(family)
    runs = [[prompt] for prompt in prompts] if BATCH in family.traps else [prompts]
    found = [answer for run in runs for answer in greedy(pruned, family, run, LENGTH)]
    for prompt, (ids, logits) in zip(prompts, found, strict=True):
        expected_ids, expected = expected_generation(family, plan, prompt, LENGTH, guess=ids)
        assert_close(family, logits, expected, f"{plan} {prompt}")
        assert ids == expected_ids


@every_family_at_length
def test_a_saved_pruned_model_reloads_and_equals_the_reference(family: Family, tmp_path: Path) -> None:
    if RELOAD in family.traps:
        pytest.skip(family.traps[RELOAD])
    model = supported(family)
    for number, plan in enumerate(removal_plans(family)):
        directory = tmp_path / str(number)
        before = plain_logits(model, family, prompts_of(family)[0])
        save_pruned(model, SkipPlan.parse(plan), directory)
        assert torch.equal(plain_logits(model, family, prompts_of(family)[0]), before)
        pruned = reload(family, directory)
        assert pruned.generation_config.pad_token_id == PAD
        check_pruned(pruned, family, plan)


@every_family_at_length
def test_a_permanently_applied_plan_equals_the_reference_and_frees_its_layers(family: Family) -> None:
    supported(family)
    plan = removal_plans(family)[-1]
    model = build(family)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.get_submodule(family.stack).children()]
    before = sum(parameter.numel() for parameter in model.parameters())
    apply_permanently(model, SkipPlan.parse(plan))
    freed = sum(size for size, letter in zip(sizes, plan, strict=True) if letter == "S")
    assert sum(parameter.numel() for parameter in model.parameters()) <= before - freed
    check_pruned(model, family, plan)


@pytest.mark.slow
@every_family
def test_many_removals(family: Family, tmp_path: Path) -> None:
    if RELOAD in family.traps:
        pytest.skip(family.traps[RELOAD])
    model = supported(family)
    for number, plan in enumerate(removal_plans(family, count=8)):
        save_pruned(model, SkipPlan.parse(plan), tmp_path / str(number))
        check_pruned(reload(family, tmp_path / str(number)), family, plan)


@pytest.mark.parametrize("family", [by_name("llava"), by_name("qwen2_vl")], ids=str)
@pytest.mark.parametrize("letter", ["F", "B"])
def test_plans_that_no_checkpoint_can_express_are_not_saved(family: Family, letter: str, tmp_path: Path) -> None:
    plan = SkipPlan.parse("S" + letter + "R" * (family.layers - 2))
    with pytest.raises(PlanError, match="layer 1"):
        save_pruned(model_of(family.name), plan, tmp_path / "model")
    assert not list(tmp_path.glob("model/*.safetensors"))


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.savable("S" * f.layers)], ids=str)
def test_plans_that_transformers_would_reload_wrongly_are_not_saved(family: Family, tmp_path: Path) -> None:
    """Gemma 4 turns the last layer into full attention when its config is read: a sliding one cannot be the last."""
    plan = "R" * (family.layers - 2) + "SS"
    with pytest.raises(PlanError):
        save_pruned(supported(family), SkipPlan.parse(plan), tmp_path / "model")


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    family = by_name("llava")
    save_pruned(model_of("llava"), SkipPlan.parse("SRRSRRS"), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    check_pruned(reload(family, tmp_path), family, "SRRSRRS")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    family = by_name("smolvlm")
    save_pruned(model_of("smolvlm"), SkipPlan.parse("SRRSRRS"), tmp_path)
    pruned = reload(family, tmp_path)
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
